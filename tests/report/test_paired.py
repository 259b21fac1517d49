"""Accuracies beside others: by question and by seed."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sts.cli import main
from megatron_sts.report.groups import Group, grouped
from megatron_sts.report.paired import ratios_of
from megatron_sts.report.run import read_run
from tests.report.test_overview import seeded
from tests.report.test_report import CONFIG

NUM = 600
NOTHING = frozenset[str]()


def group(folder: Path, name: str, answers: dict[int, dict[str, np.ndarray]], **changes: Any) -> Group:
    """Of a run a seed, which has answered these families' questions right (True) or wrong."""
    for seed, families in answers.items():
        run = seeded(folder / f"{name}-seed={seed}", seed, 0.5, **changes)
        found = json.loads((run / "evaluation.json").read_text())
        found["splits"]["eval"] = {
            family: {"accuracy": marks.mean(), "standard_error": 0.01, "num_questions": len(marks), "right": "".join("01"[mark] for mark in marks.astype(int))}
            for family, marks in families.items()
        }  # fmt: skip
        (run / "evaluation.json").write_text(json.dumps(found))
    [made] = grouped([read_run(folder / f"{name}-seed={seed}") for seed in answers])
    return made


def drawn(numbers: np.random.Generator, share: float) -> np.ndarray:
    return numbers.random(NUM) < share


def test_the_interval_covers_what_it_is_to_cover(tmp_path: Path) -> None:
    """One seed, independent answers: the width is that of a ratio of two proportions (delta method)."""
    numbers = np.random.default_rng(1)
    base, ours = drawn(numbers, 0.8), drawn(numbers, 0.7)
    found = ratios_of(group(tmp_path, "ours", {1: {"ocr": ours}}), group(tmp_path, "base", {1: {"ocr": base}}), NOTHING)
    assert found["ocr"] == found["mean"]
    assert found["ocr"].mean == pytest.approx(ours.mean() / base.mean())
    covered = np.cov(ours, base)
    shares = np.array([1 / base.mean(), -ours.mean() / base.mean() ** 2])
    error = (shares @ covered @ shares / NUM) ** 0.5
    assert found["ocr"].high - found["ocr"].low == pytest.approx(2 * 1.96 * error, rel=0.1)  # of 4,000 draws


def test_answers_to_one_question_and_runs_of_one_seed_go_together(tmp_path: Path) -> None:
    """Runs that err alike differ by nothing, however few their questions and however different their seeds."""
    numbers = np.random.default_rng(2)
    answers = {
        seed: {"ocr": drawn(numbers, share), "counting": drawn(numbers, 0.5)} for seed, share in ((1, 0.9), (2, 0.5))
    }
    found = ratios_of(group(tmp_path, "ours", answers), group(tmp_path, "base", answers), NOTHING)
    assert {name: (each.low, each.mean, each.high) for name, each in found.items()} == {
        "ocr": (1, 1, 1), "counting": (1, 1, 1), "mean": (1, 1, 1),
    }  # fmt: skip
    apart = {1: answers[2], 2: answers[1]}
    crossed = ratios_of(group(tmp_path, "apart", apart), group(tmp_path, "again", answers), NOTHING)["ocr"]
    assert crossed.mean == pytest.approx(1) and crossed.low < 0.6 and crossed.high > 1.5


def test_a_pair_is_drawn_as_one(tmp_path: Path) -> None:
    """Two questions with one answer say as little as one: the interval is wider by the root of two."""
    numbers = np.random.default_rng(3)
    once, base = drawn(numbers, 0.6), np.ones(NUM, bool)
    wide, narrow = (
        ratios_of(
            group(tmp_path, f"ours-{family}", {1: {family: np.repeat(once, 2)}}),
            group(tmp_path, f"base-{family}", {1: {family: np.repeat(base, 2)}}),
            NOTHING,
        )[family]
        for family in ("paired", "ocr")
    )
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(2**0.5, rel=0.1)


def test_what_cannot_be_paired_is_not_compared(tmp_path: Path) -> None:
    numbers = np.random.default_rng(4)
    first = group(tmp_path, "first", {1: {"ocr": drawn(numbers, 0.5), "choice": drawn(numbers, 0.5)}})
    assert ratios_of(group(tmp_path, "other", {2: {"ocr": drawn(numbers, 0.5)}}), first, NOTHING) == {}
    fewer = group(tmp_path, "fewer", {1: {"ocr": drawn(numbers, 0.5)[:50], "choice": drawn(numbers, 0.5)}})
    assert set(ratios_of(fewer, first, frozenset({"choice"}))) == {"choice"}
    old = grouped([read_run(seeded(tmp_path / "old", 1, 0.5))])[0]
    assert ratios_of(old, first, NOTHING) == {}


def test_the_page_has_the_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = np.random.default_rng(5)
    answers = {seed: {"ocr": drawn(numbers, 0.8)} for seed in (1, 2)}
    stages = [{**stage, "lds": {"alpha": 0.5}} for stage in CONFIG["stages"]]
    dense, sts = group(tmp_path, "dense", answers), group(tmp_path, "sts", answers, stages=stages)
    folders = [str(run.folder) for each in (dense, sts) for run in each.runs]
    assert main(["report", *folders, "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "overview.html").read_text()
    assert "<h2>Accuracy / that of dense</h2>" in page and "1.000 (1.000 to 1.000)" in page
    with (tmp_path / "out" / "overview.csv").open() as file:
        base, other = csv.DictReader(file)
    assert [base[f"ocr.of_first{part}"] for part in ("", ".low", ".high")] == ["", "", ""]
    assert [other[f"ocr.of_first{part}"] for part in ("", ".low", ".high")] == ["1.0000"] * 3
    capsys.readouterr()
