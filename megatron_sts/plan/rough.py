"""The planner's quick model of a run, many layouts at once: for its search, not for what it says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.resolve import Layout, Resolved, ResolvedStage
from megatron_sts.config.schema import LdsConfig
from megatron_sts.lds.mask import LAYOUT_SAMPLERS
from megatron_sts.lds.placement import Placement, placement
from megatron_sts.lds.schedule import skip_probabilities
from megatron_sts.plan.candidates import near_even
from megatron_sts.plan.steps import (
    Outcomes,
    Steps,
    StepTime,
    drawn_outcomes,
    drawn_steps,
    grid,
    layer_flops,
    step_times,
)

ROUGH_STRIDE = 4
"""Every so manieth step of the grid is looked at, with so few of the outcomes of ``sampler: rounds``."""
ROUGH_OUTCOMES = 512


class RoughTimes:
    """Of a run's layouts. A stage that skips by the layout's rounds skips what it draws for even chunks, so that layouts with
    equally many chunks are compared by the same draws, which are made once."""

    def __init__(self, resolved: Resolved, step_time: StepTime) -> None:
        self._resolved, self._step_time = resolved, step_time
        self._outcomes: dict[tuple[int, int], Outcomes] = {}
        """By stage and number of chunks; 0 for masks that no layout changes."""

    def __call__(self, layouts: Sequence[Layout]) -> NDArray[np.float64]:
        """Time of the run with each layout, to compare: in FLOPs, [layouts]."""
        time = np.zeros(len(layouts))
        for stage in self._resolved.stages:
            place = placement(self._resolved, stage)
            of_layouts = [self.steps(stage, place, layout) for layout in layouts]
            found = step_times(of_layouts, stage.num_microbatches, self._step_time)
            # All layouts are to execute the same: what their draws happen to skip cancels.
            each = np.array(
                [times.mean() / steps.totals.mean() for times, steps in zip(found, of_layouts, strict=True)]
            )
            time += each * self._expected_total(stage, place) * stage.num_steps * layer_flops(self._resolved, stage)
        return time

    def steps(self, stage: ResolvedStage, place: Placement, layout: Layout) -> Steps:
        """Some of the stage's grid under a layout."""
        lds = stage.config.lds
        if lds is not None and lds.sampler in LAYOUT_SAMPLERS:
            return drawn_steps(self._resolved.config.seed, stage, place, layout, self._steps(stage))
        if lds is None or lds.sampler != "rounds" or lds.rounds != "layout":
            return self._drawn_once(stage, place, 0).under(layout, place)
        even = near_even(place.num_layers, place.num_ranks, len(layout))
        drawn = self._drawn_once(stage, place.under(even), len(layout)).under(even, place)
        runs = drawn.work[:, 0].any(axis=2)
        work = np.where(runs[..., None], np.array(layout, dtype=np.float64), 0.0)
        _yield_to_head(work, lds, place)
        return Steps(work[:, None], drawn.weights, drawn.first, drawn.last)

    def _drawn_once(self, stage: ResolvedStage, place: Placement, vpp: int) -> Outcomes:
        if (key := (stage.index, vpp)) not in self._outcomes:
            seed, steps = self._resolved.config.seed, self._steps(stage)
            self._outcomes[key] = drawn_outcomes(seed, stage, place, steps, ROUGH_OUTCOMES)
        return self._outcomes[key]

    def _expected_total(self, stage: ResolvedStage, place: Placement) -> float:
        """Work of all ranks in a step, in layers: samplers keep the sum of the probabilities."""
        lds, num_layers, steps = stage.config.lds, place.num_layers, self._steps(stage)
        dense = num_layers + sum(place.fixed_work)
        if lds is None:
            return dense
        skipped = [skip_probabilities(lds, step, stage.num_steps, num_layers).sum() for step in steps]
        return float(dense - np.mean(skipped))

    def _steps(self, stage: ResolvedStage) -> list[int]:
        return grid(stage.num_steps)[::ROUGH_STRIDE]


def _yield_to_head(work: NDArray[np.float64], lds: LdsConfig, place: Placement) -> None:
    """As ``lds.round_sampler`` does; ``work`` [steps, vpp, pp] is changed."""
    most = math.floor(place.head_work + 0.5) if lds.head_yields == "auto" else 0
    runs = work.any(axis=2)
    last = runs.shape[1] - 1 - np.argmax(runs[:, ::-1], axis=1)
    steps = np.flatnonzero(runs.any(axis=1) & (last < runs.any(axis=0).nonzero()[0].max(initial=0)))
    work[steps, last[steps], -1] = np.maximum(work[steps, last[steps], -1] - most, 0)
