"""The study's grid of keep ratio, alpha and epsilon as a table: a row a setting of LDS, a column a keep ratio."""

from __future__ import annotations

import csv
from pathlib import Path

KEEP_RATIO = "stages.alignment.vtc.keep_ratio"
DENSE = ("no-lds", "1")


def table(path: Path) -> str:
    """Markdown: of each run the share of the dense run's mean accuracy that it kept, and of its FLOPs. ``path``: grid.csv."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    runs = {(row["case"], row[KEEP_RATIO]): row for row in rows}
    if len(runs) < len(rows):
        raise ValueError(f"{path}: several runs of one setting (seeds?), of which this table would have the last")
    cases, ratios = (list(dict.fromkeys(key[number] for key in runs)) for number in (0, 1))
    lines = [["keep ratio", *ratios], ["---", *["---:"] * len(ratios)]]
    for case in cases:
        found = [(accuracy_share(runs, case, ratio), flops_share(runs, case, ratio)) for ratio in ratios]
        lines.append([case, *(f"{kept:.3f} at {flops:.2f}" for kept, flops in found)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def accuracy_share(runs: dict[tuple[str, str], dict[str, str]], case: str, ratio: str) -> float:
    """Of the dense run's mean accuracy."""
    return float(runs[case, ratio]["eval.mean"]) / float(runs[DENSE]["eval.mean"])


def flops_share(runs: dict[tuple[str, str], dict[str, str]], case: str, ratio: str) -> float:
    """Of the dense run's FLOPs, in both stages."""
    ours, dense = (
        sum(float(runs[key][f"{stage}.flops_executed"]) for stage in ("alignment", "finetune"))
        for key in ((case, ratio), DENSE)
    )
    return ours / dense
