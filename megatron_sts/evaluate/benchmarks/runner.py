"""Asks the questions of benchmarks, all ranks together, and scores the answers. Must not know how answers are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import distributed as dist

from megatron_sts.data.records import Record
from megatron_sts.evaluate.benchmarks.journal import Journal
from megatron_sts.evaluate.benchmarks.question import Answer, Question, by_family
from megatron_sts.evaluate.benchmarks.registry import Exam
from megatron_sts.evaluate.metrics import Metrics
from megatron_sts.runtime.dist import check_same_everywhere, is_rank_zero

Ask = Callable[[Sequence[Record]], list[str]]
"""Answers to conversations that end with a user's turn; a collective with the same result on every rank."""


def run_exams(exams: Sequence[Exam], ask: Ask, folder: Path, num_at_once: int) -> list[Metrics]:
    """Asks what ``folder`` has no answers to, and scores all; a collective. Only rank 0 has the metrics, others none.

    ``num_at_once`` questions are asked together, and then their answers are in ``folder``.

    Raises:
        ConfigError: ranks see other questions or images; or, on rank 0, answers in ``folder`` are damaged.
    """
    for exam in exams:
        words = "\n".join(f"{question.key} {question.prompt}" for question in exam.questions)
        check_same_everywhere(f"what can be asked of {exam.name}", words)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not is_rank_zero()) as progress:
        answered = [_answers(exam, ask, folder, num_at_once, progress) for exam in exams]
    return [result(exam, answers) for exam, answers in zip(exams, answered, strict=True)] if is_rank_zero() else []


def _answers(exam: Exam, ask: Ask, folder: Path, num_at_once: int, progress: Progress) -> list[Answer]:
    """All answers, in the order of the questions; on other ranks than 0 those given now."""
    journal = Journal(folder / f"{exam.name}.jsonl") if is_rank_zero() else Journal(None)
    left = _left_to_ask(exam.questions, journal)
    task = progress.add_task(exam.name, total=len(exam.questions), completed=len(exam.questions) - len(left))
    for start in range(0, len(left), num_at_once):
        asked = left[start : start + num_at_once]
        texts = ask([question.record() for question in asked])
        journal.add([Answer(question, text.strip()) for question, text in zip(asked, texts, strict=True)])
        progress.advance(task, len(asked))
    found = map(journal.answer, exam.questions)
    return [answer for answer in found if answer is not None]


def _left_to_ask(questions: Sequence[Question], journal: Journal) -> list[Question]:
    """Rank 0's choice, on every rank: others may see an older file."""
    left = [number for number, question in enumerate(questions) if journal.answer(question) is None]
    box = [left]
    dist.broadcast_object_list(box, src=0)
    return [questions[number] for number in box[0]]


def result(exam: Exam, answers: Sequence[Answer]) -> Metrics:
    """The official metrics, those by family, and which images were not there; JSON-ready."""
    metrics = exam.benchmark.score(answers)
    return {
        "benchmark": exam.name,
        "headline": exam.benchmark.headline,
        **metrics,
        "family": by_family(answers, exam.benchmark.credit),
        "num_left_out": exam.num_left_out,
        "missing_images": [str(path) for path in exam.missing],
    }
