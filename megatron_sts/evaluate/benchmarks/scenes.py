"""The embedded picture tasks as a benchmark without files; its metrics follow those of the public ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_sts.data.scenes.source import EVALUATED_FAMILIES, EvalQuestion, evaluation_questions
from megatron_sts.evaluate import metrics
from megatron_sts.evaluate.benchmarks.question import Answer, Benchmark, Question
from megatron_sts.evaluate.metrics import Answered, Metrics
from megatron_sts.evaluate.scenes import ASKED, QUESTION_SEED

NUM_QUESTIONS = 504
"""Of each family: a multiple of 12, so that answers are balanced."""
POOLED = {asked: reported for reported, families in ASKED.items() for asked in families}


def read(_source: Path, _images: Path | None) -> list[Question]:
    """The same questions always, of the split ``eval``."""
    return [
        _question(question)
        for family in EVALUATED_FAMILIES
        for question in evaluation_questions(family, "eval", NUM_QUESTIONS, QUESTION_SEED)
    ]


def _question(question: EvalQuestion) -> Question:
    return Question(
        key=question.key,
        prompt=question.question,
        image=question.image,
        references=(question.answer,),
        family=POOLED.get(question.family, question.family),
        groups={"asked": (question.family,), "variant": (question.variant,), "pair": (question.pair or "",)},
        after_image=" ",  # as in training
    )


def credit(answer: Answer) -> float:
    """Exact match; all answers are lower-case words of a small vocabulary."""
    return float(answer.text == answer.question.references[0])


def score(answers: Sequence[Answer]) -> Metrics:
    """The metrics of each family (``evaluate/metrics.py``), and the mean of their accuracies."""
    families: dict[str, list[Answered]] = {}
    for answer in answers:
        families.setdefault(answer.question.family, []).append(_answered(answer))
    scores = {name: metrics.score(name, members) for name, members in sorted(families.items())}
    mean = sum(found["accuracy"] for found in scores.values()) / max(1, len(scores))
    return {"accuracy": mean, "num_questions": len(answers), "metrics": scores}


def _answered(answer: Answer) -> Answered:
    groups = answer.question.groups
    pair = groups["pair"][0] or None
    return Answered(groups["asked"][0], groups["variant"][0], answer.question.references[0], answer.text, pair)


SCENES = Benchmark(read, score, credit, headline="accuracy", is_read=lambda answer: bool(answer.text), has_files=False)
