"""How training went on in the study's runs: by epoch, from their folders into a CSV and from that a table; and the loss of each step."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import fmean

from megatron_sts.report.run import read_run

STAGE = "finetune"
COLUMNS = ("run", "seed", "epoch", "loss", "validation_loss", "gradient_norm", "layers_executed")
MEASURES = {
    "validation_loss": "validation loss at its end",
    "gradient_norm": "norm of gradients",
    "layers_executed": "layers executed",
}
"""Columns that the table has, and what it calls them."""


def course_of(folder: Path) -> list[dict[str, float]]:
    """A row an epoch: means over its steps of the loss, the norm of gradients before clipping and the share of layers that ran, and the
    validation loss after its last step."""
    run = read_run(folder)
    lines = run.steps[STAGE]
    [stage] = run.config["stages"]
    num_epochs = int(stage["epochs"])
    steps, rest = divmod(run.num_steps(STAGE), num_epochs)
    if len(lines) != run.num_steps(STAGE):
        raise ValueError(f"{folder}: {len(lines)} lines are not of every one of {run.num_steps(STAGE)} steps")
    if rest or num_epochs != stage["epochs"]:
        raise ValueError(f"{folder}: {len(lines)} steps are no whole number of each of {stage['epochs']:g} epochs")
    validated = {line["step"]: line["loss"] for line in run.validations[STAGE]}
    return [
        {
            "seed": run.config["seed"],
            "epoch": epoch + 1,
            "loss": fmean(line["loss"] for line in of_epoch),
            "validation_loss": validated[(epoch + 1) * steps],
            "gradient_norm": fmean(line["grad_norm"] for line in of_epoch),
            "layers_executed": fmean(fmean(line["layer_runs"]) / line["num_microbatches"] for line in of_epoch),
        }
        for epoch in range(num_epochs)
        for of_epoch in [lines[epoch * steps : (epoch + 1) * steps]]
    ]


def write(folders: Iterable[Path], path: Path) -> None:
    """The CSV of all runs."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for folder in folders:
            for row in course_of(folder):
                numbers = {name: value if isinstance(value, int) else f"{value:.6g}" for name, value in row.items()}
                writer.writerow({"run": folder.name, **numbers})


def write_losses(folders: Iterable[Path], path: Path, stage: str) -> None:
    """The training loss of each step of a stage: a row a step, a column a run."""
    losses = {folder.name: [line["loss"] for line in read_run(folder).steps[stage]] for folder in folders}
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", *losses])
        for step, row in enumerate(zip(*losses.values(), strict=True), start=1):
            writer.writerow([step, *(f"{loss:.5g}" for loss in row)])


def table(path: Path) -> str:
    """Markdown: by measure and case the means over seeds, a column an epoch. Layers only of cases that leave any out."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    cases = list(dict.fromkeys(_case(row) for row in rows))
    epochs = sorted({int(row["epoch"]) for row in rows})
    lines = [["in epoch", *map(str, epochs)], ["---", *["---:"] * len(epochs)]]
    for measure, words in MEASURES.items():
        for case in cases:
            found = [[float(row[measure]) for row in rows if _case(row) == case and int(row["epoch"]) == epoch] for epoch in epochs]  # fmt: skip
            if measure != "layers_executed" or any(each < 1 for values in found for each in values):
                lines.append([f"{words}, {case}", *(f"{fmean(each):.3f}" if each else "" for each in found)])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _case(row: Mapping[str, str]) -> str:
    return row["run"].removesuffix(f"-seed={row['seed']}")
