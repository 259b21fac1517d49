"""What the study's sweeps came to, as it is kept, and what its pages say. Trains nothing."""

from __future__ import annotations

import csv
from pathlib import Path

STUDY = Path(__file__).resolve().parents[2] / "examples" / "study"
PAGES = "".join(page.read_text() for page in sorted(STUDY.glob("*.md")))
"""One after the other."""
FAMILIES = ("existence", "relation", "counting", "ocr", "choice", "paired")
TEXT = PAGES.replace("\n", " ")
"""The same on one line."""


def rows_of(table: str) -> list[dict[str, str]]:
    """Of a CSV of the results: ``SWEEP``, or ``SWEEP.overview``."""
    with (STUDY / "results" / f"{table}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def by_seed(case: str, column: str) -> dict[str, float]:
    """``case``: SWEEP/NAME."""
    sweep, _, name = case.partition("/")
    return {row["seed"]: float(row[column]) for row in rows_of(sweep) if row["run"] == f"{name}-seed={row['seed']}"}


def accuracies(case: str, of: str) -> dict[str, float]:
    """By seed, in a family or the mean."""
    return by_seed(case, f"eval.{of}")


def shares_of(case: str, base: str, of: str = "mean") -> list[float]:
    """Of the base's accuracy, by seed."""
    ours, theirs = accuracies(case, of), accuracies(base, of)
    return [ours[seed] / theirs[seed] for seed in theirs]


def wall(run: dict[str, str]) -> float:
    """Seconds of training, of both stages."""
    return sum(float(run[f"{stage}.wall_s"]) for stage in ("alignment", "finetune"))
