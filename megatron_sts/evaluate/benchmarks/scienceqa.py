"""ScienceQA (Lu et al. 2022, arXiv 2209.09513): multiple choice from school science, with or without an image."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sts.evaluate.benchmarks.question import (
    LETTER_ANSWER,
    Answer,
    Benchmark,
    Question,
    accuracy,
    official_file,
    read_json,
)
from megatron_sts.evaluate.metrics import Metrics

LETTERS = "ABCDE"
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_IN_WORDS = re.compile(r"The answer is ([A-Z]).")


def read(source: Path, images: Path | None, *, only_with_image: bool) -> list[Question]:
    """Questions of the folder ``source``: ``problems.json``, ``pid_splits.json`` and ``images/test/ID/image.png``.

    Raises:
        ConfigError: a file is missing or has another format.
    """
    folder = images or source / "images" / "test"
    with official_file(source / "pid_splits.json"):
        keys = read_json(source / "pid_splits.json")["test"]
    with official_file(source / "problems.json"):
        problems = read_json(source / "problems.json")
        wanted = [key for key in keys if problems[key]["image"] or not only_with_image]
        return [_question(key, problems[key], folder) for key in wanted]


def _question(key: str, problem: dict[str, Any], images: Path) -> Question:
    if len(problem["choices"]) > len(LETTERS):
        raise ValueError(f"problem {key} has more than {len(LETTERS)} choices")
    choices = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, problem["choices"], strict=False))
    context = f"Context: {problem['hint']}\n" if problem["hint"] else ""
    return Question(
        key=key,
        prompt=context + problem["question"] + choices + LETTER_ANSWER,
        image=images / key / problem["image"] if problem["image"] else None,
        references=(LETTERS[problem["answer"]],),
        family="choice",
        groups={
            "subject": (SUBJECTS[problem["subject"]],),
            "context": _contexts(problem),
            "grade": ("G1-6" if int(problem["grade"].removeprefix("grade")) <= 6 else "G7-12",),
            "topic": (problem["topic"],),
        },
    )


def _contexts(problem: dict[str, Any]) -> tuple[str, ...]:
    """Text and image contexts overlap, as in the official table."""
    names = (*["TXT"] * bool(problem["hint"]), *["IMG"] * bool(problem["image"]))
    return names or ("NO",)


def credit(answer: Answer) -> float:
    """Whether the letter is the right one. LLaVA's script finds it: alone, before ". ", or in "The answer is X."."""
    text, letter = answer.text, ""
    if text in tuple(LETTERS):
        letter = text
    elif text[:1] in tuple(LETTERS) and text[1:3] == ". ":
        letter = text[0]
    elif len(found := _IN_WORDS.findall(text)) == 1:
        letter = found[0]
    return float(letter == answer.question.references[0])


def score(answers: Sequence[Answer]) -> Metrics:
    """Accuracy, also by subject, context, grade and topic."""
    return accuracy(answers, credit)


SCIENCEQA = Benchmark(partial(read, only_with_image=False), score, credit, headline="accuracy")
SCIENCEQA_IMG = Benchmark(partial(read, only_with_image=True), score, credit, headline="accuracy")
"""The questions that have an image, LLaVA's "SQA-I"."""
