"""A sweep's runs as one table: what each was given, cost, and became."""

from __future__ import annotations

import csv
import fcntl
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.sweep import SweepRun
from megatron_sts.launch import outcome
from megatron_sts.launch.exclusive import NO_LOCKS
from megatron_sts.report.compare import stage_costs
from megatron_sts.report.losses import NUM_LOSSES
from megatron_sts.report.run import METRICS, Run, damaged, read_run

RESULTS = "results"
UNASKED = "it has yet to be asked these questions (evaluation); the same command asks them"
Row = dict[str, Any]


def update(runs: Sequence[SweepRun], out: Path, unasked: Callable[[SweepRun], bool] = lambda _: False) -> list[Row]:
    """Both tables anew; their rows. Of the parts of a sweep that end at once each waits for the other, so that the last one sees all runs.

    ``unasked``: whether a run that is done has yet to be asked the sweep's questions.
    """
    with (out / f".{RESULTS}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        write(rows := rows_of(runs, out, unasked), out)
    return rows


def rows_of(runs: Sequence[SweepRun], out: Path, unasked: Callable[[SweepRun], bool]) -> list[Row]:
    """A row a run, finished or not."""
    return [row_of(run, out / run.name, unasked) for run in runs]


def row_of(run: SweepRun, folder: Path, unasked: Callable[[SweepRun], bool] = lambda _: False) -> Row:
    """``status`` is ``done``, also where a later start could not look; else it says how the last start ended: ``stopped`` (the same
    command goes on) or ``failed``, with the ``cause``; or it is ``missing``: not begun, not ended, or not asked these questions."""
    row: Row = {"run": run.name, "case": run.case, **run.values, "seed": run.seed, "status": "missing", "cause": None}
    told = outcome.read(folder)
    if told is None and outcome.is_there(folder):
        row |= {"status": "failed", "cause": f"{folder / outcome.OUTCOME} cannot be read"}
    elif told is not None:
        row |= {"status": told.outcome, "cause": told.cause}
    if row["status"] == "done" and unasked(run):
        row |= {"status": "missing", "cause": UNASKED}
    elif row["status"] == "done":
        try:
            found = read_run(folder)
            if not found.is_complete:
                raise damaged(folder / METRICS, "ends before the run did")
            row |= _found(found)
        except (ConfigError, OSError) as error:  # other runs' rows are not lost for it
            row |= {"status": "failed", "cause": str(error)}
    return row


def write(rows: Sequence[Row], out: Path) -> None:
    """``results.jsonl`` and ``results.csv`` in ``out``, each in one piece."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    _replace(out / f"{RESULTS}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    partial = out / f".{RESULTS}.{os.getpid()}.csv"
    with partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows({name: _cell(value) for name, value in row.items()} for row in rows)
    partial.replace(out / f"{RESULTS}.csv")


def _found(run: Run) -> Row:
    row: Row = {}
    for stage, lines in run.steps.items():
        losses = [line["loss"] for line in lines if line["loss"] is not None]
        try:
            costs = stage_costs(run, stage)
        except ConfigError:  # not every step was logged, so that there are no sums
            costs = {}
        found = {"first_loss": fmean(losses[:NUM_LOSSES]), "last_loss": fmean(losses[-NUM_LOSSES:])} if losses else {}
        last = run.validations.get(stage, [{}])[-1]
        if last.get("step") == lines[-1]["step"] + 1:  # not of earlier weights: a stop may have left the last one out
            found["validation_loss"] = last["loss"]
        row |= {f"{stage}.{name}": value for name, value in (found | costs).items()}
    if run.evaluation is not None:
        left_out = run.config["evaluation"].get("left_out_of_mean", [])
        for split, families in run.evaluation["splits"].items():
            shares = {family: found["accuracy"] for family, found in families.items()}
            row |= {f"{split}.{family}": share for family, share in shares.items()}
            kept = [share for family, share in shares.items() if family not in left_out]
            row |= {f"{split}.mean": fmean(kept)} if kept else {}
    return row


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if value is None or isinstance(value, str | int) else json.dumps(value)


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
