"""The probabilities with which masks are really drawn, and what follows from them for a run."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.schema import LdsConfig
from megatron_sts.lds.placement import Placement
from megatron_sts.lds.quota import equal_work_probabilities
from megatron_sts.lds.round_sampler import round_sampler
from megatron_sts.lds.schedule import skip_probabilities

CHANGING_SAMPLERS = ("quota", "rounds")
"""Samplers whose masks are not drawn with exactly the scheduled probabilities."""
MOST_STEPS = 512
"""The mean over a smooth decay differs by less than 1e-5 from that over all steps."""


def effective_probabilities(lds: LdsConfig, step: int, num_steps: int, placement: Placement) -> NDArray[np.float64]:
    """p'_l, with which layer l is skipped in ``step``, [num_layers]: p_l, but for ``CHANGING_SAMPLERS``."""
    probabilities = skip_probabilities(lds, step, num_steps, placement.num_layers)
    match lds.sampler:
        case "quota":
            return equal_work_probabilities(probabilities, placement)
        case "rounds":
            return round_sampler(lds, probabilities, placement).of_layers
        case _:
            return probabilities


def largest_change(lds: LdsConfig, steps: Iterable[int], num_steps: int, placement: Placement) -> float:
    """max |p'_l - p_l| over ``steps`` of a stage and its layers: what equal work costs; 0 but for ``CHANGING_SAMPLERS``."""
    if lds.sampler not in CHANGING_SAMPLERS:
        return 0.0
    return max(
        float(np.abs(effective_probabilities(lds, step, num_steps, placement) - scheduled).max())
        for step in steps
        for scheduled in [skip_probabilities(lds, step, num_steps, placement.num_layers)]
    )


def executed_fraction(lds: LdsConfig, num_steps: int, placement: Placement) -> NDArray[np.float64]:
    """Expected share of a run's steps in which each layer runs, [num_layers]: the mean of 1 - p'_l over the steps.

    For ``rounds``, whose p' take a millisecond, over at most ``MOST_STEPS`` of them, evenly spaced.
    """
    count = min(num_steps, MOST_STEPS) if lds.sampler == "rounds" else num_steps
    steps = [(2 * part + 1) * num_steps // (2 * count) for part in range(count)]
    skipped = sum(effective_probabilities(lds, step, num_steps, placement) for step in steps)
    return 1 - np.asarray(skipped) / count


def inverse_keep_scales(lds: LdsConfig, step: int, num_steps: int, placement: Placement) -> tuple[float, ...]:
    """1/(1 - p'_l) of each layer, [num_layers]; 1 for a layer that never runs.

    With it the expected contribution of a layer to the residual stream is what it adds in a dense model. Inverted
    dropout over whole layers: stochastic depth (arXiv 1603.09382) multiplies by 1 - p_l at test time instead.
    """
    keep = 1 - effective_probabilities(lds, step, num_steps, placement)
    return tuple((1 / np.where(keep > 0, keep, 1.0)).tolist())
