"""How likely each decoder layer is to be skipped: maths only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.schema import LdsConfig


def skip_probabilities(lds: LdsConfig, step: int, num_steps: int, num_layers: int) -> NDArray[np.float64]:
    """Skip probability of each layer in ``step`` = 0 ... num_steps - 1 of the stage, [num_layers].

    p_l(e) = alpha ((E-e)/E)^2 (1 + epsilon (2l-(L-1))/(L-1)), arXiv 2509.18150. Its depth factor is 0/0 for a single
    layer and taken as 1 there, its mean for every other L. ``sampler: fixed``: 1 for the fixed layers, 0 for the rest.
    """
    if not 0 <= step < num_steps:
        raise ValueError(f"step {step} is outside the stage's {num_steps} steps (0 ... {num_steps - 1})")
    if lds.sampler == "fixed":
        return _fixed(lds, num_layers)
    return lds.alpha * _decay(lds, np.float64(step), num_steps) * _depth_factor(lds, num_layers)


def mean_skip_fraction(lds: LdsConfig, num_steps: int, num_layers: int) -> float:
    """Expected share of (step, layer) pairs skipped in a run: the exact mean of ``skip_probabilities``.

    The depth factor averages to 1, so it is alpha times the mean decay; paper: alpha (E+1)(2E+1)/(6E^2) -> alpha/3.
    """
    if lds.sampler == "fixed":
        return float(_fixed(lds, num_layers).mean())
    return lds.alpha * float(_decay(lds, np.arange(num_steps, dtype=np.float64), num_steps).mean())


def _decay(lds: LdsConfig, step: NDArray[np.float64] | np.float64, num_steps: int) -> NDArray[np.float64]:
    remaining = np.ones_like(step) if lds.schedule == "constant" else (num_steps - step) / num_steps
    return np.asarray(remaining * remaining)


def _depth_factor(lds: LdsConfig, num_layers: int) -> NDArray[np.float64]:
    if lds.depth_profile == "flat":
        return np.ones(num_layers)
    return 1 + lds.epsilon * np.linspace(-1.0, 1.0, num_layers) if num_layers > 1 else np.ones(1)


def _fixed(lds: LdsConfig, num_layers: int) -> NDArray[np.float64]:
    outside = [layer for layer in lds.fixed_layers if not 0 <= layer < num_layers]
    if outside:
        raise ValueError(f"lds.fixed_layers names {outside}; the model's layers are 0 ... {num_layers - 1}")
    return np.isin(np.arange(num_layers), lds.fixed_layers).astype(np.float64)
