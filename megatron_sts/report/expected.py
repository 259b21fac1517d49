"""What a run's config says that its steps so far should have executed. Given by whoever can read configs; knows no page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sts.report.run import Run

NUM_BINS = 40
"""Of a stage's time, at most."""


@dataclass(frozen=True)
class ExpectedStage:
    """Of one stage, over the steps that it has come to."""

    layers: NDArray[np.float64]
    """Share of micro-batches in which each layer runs, [bins of time, layers]."""
    visual_share: float | None
    """Of an image's tokens, what VTC keeps; None without images."""
    flops: float
    """Of all these steps, rows being full."""


Expected = Mapping[str, ExpectedStage]
"""By stage."""


def bins_of(num_steps: int) -> NDArray[np.int64]:
    """Borders of the bins of time, in steps, [bins + 1]."""
    return np.linspace(0, num_steps, min(NUM_BINS, num_steps) + 1).round().astype(np.int64)


def executed_layers(run: Run, stage: str) -> NDArray[np.float64]:
    """Executed share of a stage's micro-batches, [bins of time, layers]; NaN where a bin has no logged step."""
    lines = run.steps[stage]
    steps = np.array([line["step"] for line in lines])
    shares = np.array([np.array(line["layer_runs"]) / line["num_microbatches"] for line in lines])
    borders = bins_of(int(steps[-1]) + 1)
    places = np.searchsorted(borders, steps, side="right") - 1
    return np.array(
        [
            shares[places == place].mean(0) if (places == place).any() else np.full(shares.shape[1], np.nan)
            for place in range(len(borders) - 1)
        ]
    )
