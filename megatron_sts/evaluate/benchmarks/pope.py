"""POPE (Li et al. 2023, arXiv 2305.10355): is an object in the image? Absent ones are random, popular or adversarial."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_sts.config.checks import refuse
from megatron_sts.evaluate.benchmarks.question import (
    SHORT_ANSWER,
    Answer,
    Benchmark,
    Question,
    members_by_group,
    official_file,
)
from megatron_sts.evaluate.metrics import Metrics, average, yes_rates

SPLITS = ("random", "popular", "adversarial")


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
        entries = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        return [
            Question(
                key=f"{split}/{entry['question_id']}",
                prompt=entry["text"] + SHORT_ANSWER,
                image=images / entry["image"],
                references=(entry["label"],),
                family="existence",
                groups={"split": (split,)},
            )
            for entry in entries
        ]


def says_yes(text: str) -> bool:
    """As the official ``evaluate.py``: yes, unless the first sentence has one of the words No, no, not."""
    return {"No", "no", "not"}.isdisjoint(text.split(".")[0].replace(",", "").split(" "))


def credit(answer: Answer) -> float:
    """Whether yes or no is right."""
    return float(says_yes(answer.text) == (answer.question.references[0] != "no"))


def score(answers: Sequence[Answer]) -> Metrics:
    """Accuracy, precision, recall, F1 and the share of "yes" in each split, and their means over splits."""
    splits = {name: _score_split(members) for name, members in members_by_group(answers, "split").items()}
    names = ("accuracy", "precision", "recall", "f1", "yes_rate")
    means = {name: sum(split[name] for split in splits.values()) / max(1, len(splits)) for name in names}
    return {**means, "num_questions": len(answers), "split": splits}


def _score_split(answers: Sequence[Answer]) -> Metrics:
    said_and_true = [(says_yes(answer.text), answer.question.references[0] != "no") for answer in answers]
    return {**average(map(credit, answers)), **yes_rates(said_and_true)}


POPE = Benchmark(read, score, credit, headline="f1")
