"""Asks the questions of benchmarks, all ranks together, and scores the answers. Must not know how answers are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import distributed as dist

from megatron_sts.data.records import BadSampleError, Record
from megatron_sts.evaluate.benchmarks.journal import Journal
from megatron_sts.evaluate.benchmarks.question import Answer, Question, by_family
from megatron_sts.evaluate.benchmarks.registry import Exam
from megatron_sts.evaluate.metrics import Metrics
from megatron_sts.runtime.dist import check_same_everywhere, is_rank_zero
from megatron_sts.runtime.progress_lines import ProgressLines

Ask = Callable[[Sequence[Record]], list[str]]
"""Answers to conversations that end with a user's turn; a collective with the same result on every rank.

Raises BadSampleError, on every rank, where one of them cannot be used.
"""


def run_exams(exams: Sequence[Exam], ask: Ask, folder: Path, num_at_once: int) -> list[Metrics]:
    """Asks what ``folder`` has no answers to, and scores all; a collective. Only rank 0 has the metrics, others none.

    ``num_at_once`` questions are asked together, and then their answers are in ``folder``.

    Raises:
        BadSampleError: no question of a benchmark can be asked.
        ConfigError: ranks see other questions or images; or, on rank 0, answers in ``folder`` are damaged.
    """
    for exam in exams:
        words = "\n".join(f"{question.key} {question.prompt}" for question in exam.questions)
        check_same_everywhere(f"what can be asked of {exam.name}", words)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, disable=not is_rank_zero()) as progress:
        found = [_answers(exam, ask, folder, num_at_once, progress) for exam in exams]
    return [result(exam, *of_exam) for exam, of_exam in zip(exams, found, strict=True)] if is_rank_zero() else []


def _answers(
    exam: Exam, ask: Ask, folder: Path, num_at_once: int, progress: Progress
) -> tuple[list[Answer], dict[str, str]]:
    """All answers, in the order of the questions, and why questions have none; on other ranks than 0 those given now."""
    journal = Journal(folder / f"{exam.name}.jsonl") if is_rank_zero() else Journal(None)
    left = _left_to_ask(exam.questions, journal)
    task = progress.add_task(exam.name, total=len(exam.questions), completed=len(exam.questions) - len(left))
    lines = ProgressLines(progress, f"{exam.name}, question", len(exam.questions))
    unusable: dict[str, str] = {}
    for start in range(0, len(left), num_at_once):
        asked = left[start : start + num_at_once]
        answers, refused = _ask_usable(asked, ask)
        journal.add(answers)
        unusable |= refused
        progress.advance(task, len(asked))
        lines.tell(len(exam.questions) - len(left) + start + len(asked))
    if len(unusable) == len(exam.questions):
        raise BadSampleError(f"{exam.name}: no question can be asked ({next(iter(unusable.values()))})")
    found = map(journal.answer, exam.questions)
    return [answer for answer in found if answer is not None], unusable


def _ask_usable(questions: Sequence[Question], ask: Ask) -> tuple[list[Answer], dict[str, str]]:
    """The answers, and by key why a question cannot be asked: then each is asked alone, which finds it on every rank."""
    try:
        texts = ask([question.record() for question in questions])
    except BadSampleError as error:
        if len(questions) == 1:
            return [], {questions[0].key: str(error)}
        alone = [_ask_usable([question], ask) for question in questions]
        return [answer for found, _ in alone for answer in found], {
            k: why for _, bad in alone for k, why in bad.items()
        }
    return [Answer(question, text.strip()) for question, text in zip(questions, texts, strict=True)], {}


def _left_to_ask(questions: Sequence[Question], journal: Journal) -> list[Question]:
    """Rank 0's choice, on every rank: others may see an older file."""
    left = [number for number, question in enumerate(questions) if journal.answer(question) is None]
    box = [left]
    dist.broadcast_object_list(box, src=0)
    return [questions[number] for number in box[0]]


def result(exam: Exam, answers: Sequence[Answer], unusable: Mapping[str, str]) -> Metrics:
    """The official metrics, those by family, and what they hide: answers that the rule could not read, images that were
    not there, and which questions could not be asked, by key. JSON-ready.
    """
    metrics = exam.benchmark.score(answers)
    return {
        "benchmark": exam.name,
        "headline": exam.benchmark.headline,
        **metrics,
        "family": by_family(answers, exam.benchmark.credit),
        "num_unread": sum(not exam.benchmark.is_read(answer) for answer in answers),
        "num_left_out": exam.num_left_out + len(unusable),
        "missing_images": [str(path) for path in exam.missing],
        "unusable": dict(unusable),
    }
