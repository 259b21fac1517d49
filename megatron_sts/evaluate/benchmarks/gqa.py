"""GQA (Hudson and Manning 2019, arXiv 1902.09506): compositional questions about real images, exact match."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sts.evaluate.benchmarks.question import (
    SHORT_ANSWER,
    Answer,
    Benchmark,
    Question,
    accuracy,
    entry_of,
    label,
    official_file,
    read_json,
    text,
)
from megatron_sts.evaluate.metrics import Metrics

QUESTIONS = "testdev_balanced_questions.json"
STRUCTURAL_TYPES = ("verify", "query", "choose", "logical", "compare")
SEMANTIC_TYPES = {"attr": "attribute", "cat": "category", "global": "scene", "obj": "object", "rel": "relation"}
"""As the official ``eval.py`` names them."""


def read(source: Path, images: Path | None) -> list[Question]:
    """Questions of ``source``, a folder with ``testdev_balanced_questions.json`` and ``images/``, or another split's file.

    The official accuracy is over balanced questions, so others are left out.

    Raises:
        ConfigError: the file is missing or has another format.
    """
    path = source if source.is_file() else source / QUESTIONS
    folder = images or path.parent / "images"
    with official_file(path):
        entries = read_json(path).items()
        return [_question(key, entry, folder) for key, entry in entries if entry.get("isBalanced", True)]


def _question(key: str, entry: dict[str, Any], images: Path) -> Question:
    with entry_of(key):
        structural = label(entry["types"], "structural", STRUCTURAL_TYPES)
        semantic = SEMANTIC_TYPES[label(entry["types"], "semantic", SEMANTIC_TYPES)]
        return Question(
            key=key,
            prompt=text(entry, "question") + SHORT_ANSWER,
            image=images / f"{text(entry, 'imageId')}.jpg",
            references=(text(entry, "answer"),),
            family=semantic,
            groups={
                "structural": (structural,),
                "semantic": (semantic,),
                "answer": ("open" if structural == "query" else "binary",),
            },
        )


def handed_in(said: str) -> str:
    """What LLaVA's ``convert_gqa_for_eval.py`` hands to the official script: no full stop at the end, lower case."""
    return said.rstrip(".").lower()


def credit(answer: Answer) -> float:
    """Exact match of what is handed in."""
    return float(handed_in(answer.text) == answer.question.references[0])


def score(answers: Sequence[Answer]) -> Metrics:
    """Accuracy, also by structural type, by semantic type, and of open and binary questions."""
    return accuracy(answers, credit)


GQA = Benchmark(read, score, credit, headline="accuracy", is_read=lambda answer: bool(handed_in(answer.text).strip()))
