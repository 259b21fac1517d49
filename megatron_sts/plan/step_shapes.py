"""What the steps of a stage run under its skip masks, as ``cost`` asks for it. Torch-free."""

from __future__ import annotations

from collections import Counter

import numpy as np

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.cost.pass_order import grouped
from megatron_sts.cost.step import StepShape, dense_step
from megatron_sts.lds.mask import SkipMask, draw_mask
from megatron_sts.lds.placement import placement
from megatron_sts.lds.rounds import active_rounds

MOST_STEPS = 256
"""Masks that a mean is taken over."""


def mask_of(resolved: Resolved, stage: ResolvedStage, step: int) -> SkipMask | None:
    """The mask that a step of the stage draws; None without LDS."""
    lds, num = stage.config.lds, stage.num_microbatches
    if lds is None:
        return None
    place = placement(resolved, stage)
    return draw_mask(lds, resolved.config.seed, stage.index, step, stage.num_steps, place, num)


def step_shape(resolved: Resolved, stage: ResolvedStage, step: int) -> StepShape:
    """What one step runs, with the mask that it draws."""
    mask, counts = mask_of(resolved, stage, step), stage.tokens(step)
    if mask is None:
        return dense_step(resolved, stage, counts)
    layout, num = resolved.layers_per_chunk, stage.num_microbatches
    runs = tuple(num * (1 - sum(column) / len(column)) for column in zip(*mask.rows, strict=True))
    active = tuple(1.0 - idle for idle in mask.idle)
    return StepShape(counts, runs, active, len(grouped(len(layout), active_rounds(mask, layout))))


def mean_steps(resolved: Resolved, stage: ResolvedStage) -> list[tuple[float, StepShape]]:
    """The stage's steps by the shape of their rows, each with its share of all.

    What they run is the mean over at most ``MOST_STEPS`` masks, evenly spaced: the same for all shapes, also where LDS and VTC
    change over the same stage.
    """
    count = min(stage.num_steps, MOST_STEPS) if stage.config.lds is not None else 1
    steps = [step_shape(resolved, stage, (2 * part + 1) * stage.num_steps // (2 * count)) for part in range(count)]
    runs, active = (
        np.mean(rows, axis=0).tolist() for rows in zip(*((s.layer_runs, s.layer_active) for s in steps), strict=True)
    )
    num_units = float(np.mean([step.num_units for step in steps]))
    shapes = (
        Counter(stage.tokens(step) for step in range(stage.num_steps)) if stage.config.vtc else {stage.uncompressed: 1}
    )
    whole = sum(shapes.values())
    return [
        (number / whole, StepShape(counts, tuple(runs), tuple(active), num_units)) for counts, number in shapes.items()
    ]
