"""POPE (Li et al. 2023, arXiv 2305.10355): is an object in the image? Absent ones are random, popular or adversarial."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sts.config.errors import refuse
from megatron_sts.evaluate.benchmarks.question import (
    SHORT_ANSWER,
    Answer,
    Benchmark,
    Question,
    check_once,
    entry_of,
    label,
    members_by_group,
    official_file,
    parse_json,
    text,
)
from megatron_sts.evaluate.metrics import Metrics, average, yes_rates

SPLITS = ("random", "popular", "adversarial")
_NO_WORDS = {"No", "no", "not"}


def read(source: Path, images: Path | None) -> list[Question]:
    """Questions of the folder ``source``: ``coco_pope_SPLIT.json`` for any of the three splits, and ``val2014/``.

    Raises:
        ConfigError: no split is there, or a file has another format.
    """
    folder = images or source / "val2014"
    found = [split for split in SPLITS if _path(source, split).is_file()]
    if not found:
        remedy = f"give the folder of {_path(source, SPLITS[0]).name} and the other splits"
        refuse("--benchmark", f"pope={source}", "no split of POPE is there", remedy)
    return [question for split in found for question in _read_split(source, split, folder)]


def _path(source: Path, split: str) -> Path:
    return source / f"coco_pope_{split}.json"


def _read_split(source: Path, split: str, images: Path) -> list[Question]:
    path = _path(source, split)
    with official_file(path):
        lines = path.read_text(encoding="utf-8").split("\n")
        entries = [parse_json(line) for line in lines if line.strip()]
        check_once(f"question {entry['question_id']}" for entry in entries)
        return [_question(split, entry, images) for entry in entries]


def _question(split: str, entry: dict[str, Any], images: Path) -> Question:
    with entry_of(entry["question_id"]):
        return Question(
            key=f"{split}/{entry['question_id']}",
            prompt=text(entry, "text") + SHORT_ANSWER,
            image=images / text(entry, "image"),
            references=(label(entry, "label", ("yes", "no")),),
            family="existence",
            groups={"split": (split,)},
        )


def says_yes(said: str) -> bool:
    """As the official ``evaluate.py``: yes, unless the first sentence has one of the words No, no, not."""
    return _NO_WORDS.isdisjoint(_first_sentence(said))


def is_read(answer: Answer) -> bool:
    """Whether the first sentence says yes or no; without either the official rule takes it for yes."""
    return not says_yes(answer.text) or any(
        word.lower().rstrip("!?:;") == "yes" for word in _first_sentence(answer.text)
    )


def _first_sentence(said: str) -> list[str]:
    return said.split(".")[0].replace(",", "").split(" ")


def credit(answer: Answer) -> float:
    """Whether yes or no is right."""
    return float(says_yes(answer.text) == (answer.question.references[0] == "yes"))


def score(answers: Sequence[Answer]) -> Metrics:
    """Accuracy, precision, recall, F1 and the share of "yes" in each split, and their means over splits."""
    splits = {name: _score_split(members) for name, members in members_by_group(answers, "split").items()}
    names = ("accuracy", "precision", "recall", "f1", "yes_rate")
    means = {name: sum(split[name] for split in splits.values()) / max(1, len(splits)) for name in names}
    return {**means, "num_questions": len(answers), "split": splits}


def _score_split(answers: Sequence[Answer]) -> Metrics:
    said_and_true = [(says_yes(answer.text), answer.question.references[0] == "yes") for answer in answers]
    return {**average(map(credit, answers)), **yes_rates(said_and_true)}


POPE = Benchmark(read, score, credit, headline="f1", is_read=is_read)
