"""ScienceQA (Lu et al. 2022, arXiv 2209.09513): multiple choice from school science, with or without an image."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sts.evaluate.benchmarks.question import (
    LETTER_ANSWER,
    Answer,
    Benchmark,
    Question,
    accuracy,
    check_once,
    entry_of,
    label,
    official_file,
    read_json,
    text,
)
from megatron_sts.evaluate.metrics import Metrics

LETTERS = "ABCDE"
GRADES = tuple(f"grade{number}" for number in range(1, 13))
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
        check_once(f"problem {key}" for key in keys)
    with official_file(source / "problems.json"):
        problems = read_json(source / "problems.json")
        if absent := [key for key in keys if key not in problems]:
            raise ValueError(f"problem {absent[0]} of pid_splits.json is not there")
        questions = [_question(key, problems[key], folder) for key in keys]
    return [question for question in questions if question.image is not None or not only_with_image]


def _question(key: str, problem: dict[str, Any], images: Path) -> Question:
    with entry_of(key):
        context = f"Context: {text(problem, 'hint')}\n" if problem["hint"] else ""
        options = _options(problem["choices"])
        choices = "".join(f"\n{letter}. {choice}" for letter, choice in options.items())
        return Question(
            key=key,
            prompt=context + text(problem, "question") + choices + LETTER_ANSWER,
            image=images / key / text(problem, "image") if problem["image"] else None,
            references=(_right(problem["answer"], options),),
            family="choice",
            groups={
                "subject": (SUBJECTS[label(problem, "subject", SUBJECTS)],),
                "context": _contexts(problem),
                "grade": ("G1-6" if int(label(problem, "grade", GRADES).removeprefix("grade")) <= 6 else "G7-12",),
                "topic": (text(problem, "topic", may_be_blank=True),),
            },
        )


def _options(choices: Sequence[object]) -> dict[str, str]:
    """The choices by letter."""
    if not 2 <= len(choices) <= len(LETTERS) or not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f"has {len(choices)} choices, not 2 to {len(LETTERS)} texts")
    return dict(zip(LETTERS, map(str, choices), strict=False))


def _right(answer: object, options: Mapping[str, str]) -> str:
    """The letter of the choice with that number."""
    if not isinstance(answer, int) or answer not in range(len(options)):
        raise ValueError(f"answer is {json.dumps(answer)}, the number of none of its {len(options)} choices")
    return list(options)[answer]


def _contexts(problem: dict[str, Any]) -> tuple[str, ...]:
    """Text and image contexts overlap, as in the official table."""
    names = (*["TXT"] * bool(problem["hint"]), *["IMG"] * bool(problem["image"]))
    return names or ("NO",)


def letter_of(said: str) -> str:
    """Where LLaVA's ``eval_science_qa.py`` finds the letter: alone, before ". ", or in "The answer is X."; else ""."""
    if said in tuple(LETTERS):
        return said
    if said[:1] in tuple(LETTERS) and said[1:3] == ". ":
        return said[0]
    return found[0] if len(found := _IN_WORDS.findall(said)) == 1 else ""


def is_read(answer: Answer) -> bool:
    """Whether the letter of a choice is found."""
    letter = letter_of(answer.text)
    return bool(letter) and f"\n{letter}. " in answer.question.prompt


def credit(answer: Answer) -> float:
    """Whether the letter is the right one."""
    return float(letter_of(answer.text) == answer.question.references[0])


def score(answers: Sequence[Answer]) -> Metrics:
    """Accuracy, also by subject, context, grade and topic."""
    return accuracy(answers, credit)


SCIENCEQA = Benchmark(partial(read, only_with_image=False), score, credit, headline="accuracy", is_read=is_read)
SCIENCEQA_IMG = Benchmark(partial(read, only_with_image=True), score, credit, headline="accuracy", is_read=is_read)
"""The questions that have an image, LLaVA's "SQA-I"."""
