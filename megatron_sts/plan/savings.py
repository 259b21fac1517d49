"""What layers that a whole step skips save besides their products: communication between data-parallel ranks, and the optimizer's work."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.schema import LdsConfig
from megatron_sts.cost.memory import GRADIENT_BYTES, layer_parameters_per_rank, memory_per_rank
from megatron_sts.lds.effective import effective_probabilities
from megatron_sts.lds.mask import draw_mask
from megatron_sts.lds.placement import placement
from megatron_sts.plan.steps import grid


@dataclass(frozen=True)
class Savings:
    """Of one stage, in the mean over its steps: shares of what the dense stage has."""

    of_ranks: tuple[float, ...]
    """Of each pipeline rank's trained parameters, the share that idles in a step."""
    reduced: float | None
    """Saved of the bytes that data-parallel ranks reduce (or reduce-scatter); None with one copy of the model."""
    gathered: float | None
    """Saved of the bytes that the distributed optimizer gathers; None without it."""
    updated: float
    """Saved of the optimizer's parameter updates."""


def savings(resolved: Resolved, stage: ResolvedStage, lds: LdsConfig) -> Savings:
    """Of a stage that skips by ``lds``. Only ``skipped_update: freeze`` saves updates; gathers, also those that wait for a step
    that runs the layer (``overlap_param_gather``)."""
    place = placement(resolved, stage)
    trained = np.array([memory.gradients_bytes / GRADIENT_BYTES for memory in memory_per_rank(resolved, stage)])
    of_layer = 0 if "language" in stage.config.freeze else layer_parameters_per_rank(resolved)
    layers = np.bincount(place.owner, weights=_idle(resolved, stage, lds), minlength=place.num_ranks)
    idle = layers * of_layer
    share = float(idle.sum() / trained.sum())
    copies, freezes = resolved.data_parallel_size > 1, lds.skipped_update == "freeze"
    parallel = resolved.config.parallel
    gathers = copies and parallel.use_distributed_optimizer
    return Savings(
        of_ranks=tuple((idle / np.maximum(trained, 1)).tolist()),
        reduced=share if copies else None,
        gathered=(share if freezes or parallel.overlap_param_gather else 0.0) if gathers else None,
        updated=share if freezes else 0.0,
    )


def _idle(resolved: Resolved, stage: ResolvedStage, lds: LdsConfig) -> NDArray[np.float64]:
    """In which share of the steps no micro-batch runs a layer, [layers]."""
    place, steps = placement(resolved, stage), grid(stage.num_steps)
    if lds.granularity == "step":
        return np.mean([effective_probabilities(lds, step, stage.num_steps, place) for step in steps], axis=0)
    seed, num = resolved.config.seed, stage.num_microbatches
    masks = [draw_mask(lds, seed, stage.index, step, stage.num_steps, place, num) for step in steps]
    return np.mean([mask.idle for mask in masks], axis=0)
