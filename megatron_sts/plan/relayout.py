"""Whether a run gains by another layout from some checkpoint on: a stage begins with much skipping and ends with none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.resolve import Layout, Resolved, ResolvedStage, with_layout
from megatron_sts.lds.placement import placement
from megatron_sts.plan.layout import choose_layout, expected_totals
from megatron_sts.plan.schedule import schedule_time
from megatron_sts.plan.steps import StepTime, drawn_steps, grid, layer_flops, step_times

LEAST_GAIN = 0.01
"""Of the run's time: less is not worth a restart."""


@dataclass(frozen=True)
class Relayout:
    """Two layouts, one after the other."""

    stage: str
    step: int
    """The first step under ``after``; 0 for a later stage that begins with it."""
    before: Layout
    after: Layout
    gain: float
    """Share of the time of the run in one layout."""


def best_relayout(
    resolved: Resolved, layout: Layout, dense_layout: Layout, step_time: StepTime = schedule_time
) -> Relayout:
    """The best change from one layout to another at one point, and what it gains over ``layout`` all along.

    Tried, each before and after each point of the stages' grids: these two, and for every stage the layouts planned for
    it alone, as it is and as if it skipped all along as in its first step.
    """
    layouts = list(dict.fromkeys([layout, dense_layout, *_of_parts(resolved, step_time)]))
    points = [(stage, step) for stage in resolved.stages for step in grid(stage.num_steps)]
    times = np.concatenate([_step_times(resolved, stage, layouts, step_time) for stage in resolved.stages], axis=1)
    before = np.pad(np.cumsum(times, axis=1), [(0, 0), (1, 0)])
    after = before[:, -1:] - before
    if len(points) == 1:  # a step has no middle
        return Relayout(resolved.stages[0].name, 0, layout, layout, 0.0)
    split = 1 + int(np.argmin((before.min(axis=0) + after.min(axis=0))[1:-1]))  # there is no checkpoint before the run
    stage, step = points[split]
    first, second = int(np.argmin(before[:, split])), int(np.argmin(after[:, split]))
    part = stage.num_steps // (2 * len(grid(stage.num_steps)))  # the grid has the middles of equal parts
    return Relayout(
        stage=stage.name,
        step=step - part,
        before=layouts[first],
        after=layouts[second],
        gain=float(1 - (before[first, split] + after[second, split]) / before[0, -1]),
    )


def _of_parts(resolved: Resolved, step_time: StepTime) -> list[Layout]:
    """Planned for stages alone."""
    parts: list[ResolvedStage] = list(resolved.stages) if len(resolved.stages) > 1 else []
    for stage in resolved.stages:
        if stage.config.lds is not None and stage.config.lds.sampler != "fixed":
            steady = stage.config.lds.model_copy(update={"schedule": "constant"})
            parts.append(stage.model_copy(update={"config": stage.config.model_copy(update={"lds": steady})}))
    return [choose_layout(resolved.model_copy(update={"stages": (part,)}), step_time) for part in parts]


def _step_times(
    resolved: Resolved, stage: ResolvedStage, layouts: list[Layout], step_time: StepTime
) -> NDArray[np.float64]:
    """Time of the steps that each of the grid's stands for, in FLOPs, [layouts, grid]."""
    steps = grid(stage.num_steps)
    place, seed = placement(resolved, stage), resolved.config.seed
    drawn = [drawn_steps(seed, stage, place, layout, steps) for layout in layouts]
    times = step_times(drawn, stage.num_microbatches, step_time)
    weight = stage.num_steps / len(steps) * layer_flops(resolved, stage)
    return weight * np.array(
        [
            of_layout * expected_totals(with_layout(resolved, layout), stage) / each.totals
            for of_layout, layout, each in zip(times, layouts, drawn, strict=True)
        ]
    )
