"""How likely each decoder layer is to be skipped: maths only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.schema import LdsConfig


def skip_probabilities(lds: LdsConfig, step: int, num_steps: int, num_layers: int) -> NDArray[np.float64]:
    """Skip probability of each layer in ``step`` = 0 ... num_steps - 1 of the stage, [num_layers].

    p_l(e) = alpha decay(e) depth(l), a step counting as an epoch: x = e/E. The paper's (arXiv 2509.18150) are decay
    (1-x)^2 and depth 1 + epsilon (2l-(L-1))/(L-1), which is 0/0 for a single layer and taken as 1 there, its mean for
    every other L. Besides them:

    - ``schedule``: ``linear`` 1-x; ``cosine`` (1 + cos(pi x))/2, the annealing of arXiv 1608.03983; ``constant`` 1;
      ``piecewise`` straight lines through ``schedule_points``, held before the first and after the last.
    - ``depth_profile``: ``flat`` 1; ``protect`` (ours) 0 for the first ``protect_first`` and the last ``protect_last``
      layers, and the paper's factor for the L' between them over their own indices l' = 0 ... L'-1.
    - ``sampler: fixed``: 1 for the fixed layers, 0 for the rest.

    Raises ValueError for a step outside the stage, and where the model has not the layers that the settings name.
    """
    if not 0 <= step < num_steps:
        raise ValueError(f"step {step} is outside the stage's {num_steps} steps (0 ... {num_steps - 1})")
    if lds.sampler == "fixed":
        return _fixed(lds, num_layers)
    return lds.alpha * _decay(lds, np.float64(step), num_steps) * _depth(lds, num_layers)


def mean_skip_fraction(lds: LdsConfig, num_steps: int, num_layers: int) -> float:
    """Expected share of (step, layer) pairs skipped in a run: the exact mean of ``skip_probabilities``.

    Decay and depth do not depend on each other, so it is alpha times the product of their means; with the paper's
    depth, whose mean is 1, and the paper's decay: alpha (E+1)(2E+1)/(6E^2) -> alpha/3.
    """
    if lds.sampler == "fixed":
        return float(_fixed(lds, num_layers).mean())
    decay = _decay(lds, np.arange(num_steps, dtype=np.float64), num_steps)
    return lds.alpha * float(decay.mean()) * float(_depth(lds, num_layers).mean())


def _decay(lds: LdsConfig, step: NDArray[np.float64] | np.float64, num_steps: int) -> NDArray[np.float64]:
    remaining = np.asarray((num_steps - step) / num_steps)
    match lds.schedule:
        case "paper":
            return remaining * remaining
        case "linear":
            return remaining
        case "cosine":
            return (1 + np.cos(np.pi * step / num_steps)) / 2
        case "constant":
            return np.ones_like(remaining)
        case "piecewise":
            x, decay = zip(*lds.schedule_points, strict=True)
            return np.asarray(np.interp(step / num_steps, x, decay))


def _depth(lds: LdsConfig, num_layers: int) -> NDArray[np.float64]:
    match lds.depth_profile:
        case "linear":
            return _linear_depth(lds.epsilon, num_layers)
        case "flat":
            return np.ones(num_layers)
        case "protect":
            skippable = num_layers - lds.protect_first - lds.protect_last
            if skippable < 1:
                raise ValueError(
                    f"lds.protect_first={lds.protect_first} and lds.protect_last={lds.protect_last} leave none of "
                    f"{num_layers} layers to skip"
                )
            return np.pad(_linear_depth(lds.epsilon, skippable), (lds.protect_first, lds.protect_last))


def _linear_depth(epsilon: float, num_layers: int) -> NDArray[np.float64]:
    return 1 + epsilon * np.linspace(-1.0, 1.0, num_layers) if num_layers > 1 else np.ones(1)


def _fixed(lds: LdsConfig, num_layers: int) -> NDArray[np.float64]:
    outside = [layer for layer in lds.fixed_layers if not 0 <= layer < num_layers]
    if outside:
        raise ValueError(f"lds.fixed_layers names {outside}; the model's layers are 0 ... {num_layers - 1}")
    return np.isin(np.arange(num_layers), lds.fixed_layers).astype(np.float64)
