"""A run's steps in the order in which they came, against steps, FLOPs and seconds. Knows no page and no figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sts.report.run import Line, Run

Values = NDArray[np.float64]
"""A number a logged step, NaN where there is none."""


@dataclass(frozen=True)
class Course:
    """Of one stage. ``steps``, ``flops`` and ``seconds`` are those spent since the run began, this step included."""

    steps: Values
    flops: Values
    """Executed."""
    seconds: Values
    """Within steps: without starts, checkpoints and evaluation."""
    losses: Values
    gradient_norms: Values


def courses(run: Run) -> dict[str, Course]:
    """By stage, for those that have lines. A step without a line (``logging.interval_steps``) counts as the next one that has."""
    found, before = {}, np.zeros(3)
    for stage, lines in run.steps.items():
        counts = np.diff([line["step"] for line in lines], prepend=-1)
        spent = np.cumsum(
            [counts, counts * _values(lines, "flops_executed"), counts * _values(lines, "step_time_s")], axis=1
        )
        spent += before[:, None]
        before = spent[:, -1]
        found[stage] = Course(spent[0], spent[1], spent[2], _values(lines, "loss"), _values(lines, "grad_norm"))
    return found


def smoothed(values: Values, window: int) -> Values:
    """The mean of the last ``window`` values that are numbers, or of as many as there are; NaN where none is."""
    is_number = np.isfinite(values)
    sums, counts = (
        np.cumsum(np.pad(part, (1, 0))) for part in (np.where(is_number, values, 0.0), is_number.astype(float))
    )
    starts = np.maximum(np.arange(len(values)) + 1 - window, 0)
    count = counts[1:] - counts[starts]
    return np.divide(sums[1:] - sums[starts], count, out=np.full(len(values), np.nan), where=count > 0)


def _values(lines: Sequence[Line], field: str) -> Values:
    return np.array([np.nan if line.get(field) is None else line[field] for line in lines], dtype=np.float64)
