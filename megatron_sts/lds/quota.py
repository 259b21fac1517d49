"""Skip probabilities changed so that every pipeline rank expects to execute the same work."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_sts.lds.placement import Placement


def equal_work_probabilities(probabilities: NDArray[np.float64], placement: Placement) -> NDArray[np.float64]:
    """The probabilities of one step, those of each pipeline rank's layers scaled by one factor, [num_layers].

    A rank expects to execute its fixed work and those of its layers that run. The factors bring all ranks to one
    level of work W while the sum over all layers, the expected number of skipped layers, stays what it was. Scaling
    ends where a probability reaches 1 (the rank's other layers then take over, in proportion), and a layer of
    probability 0 keeps it. A rank that therefore cannot reach W stays above it with all its layers skipped that may
    be, or below it with none skipped, and the others share the difference. Exact up to rounding: the sum, and the
    equality of all ranks between these two bounds.
    """
    owner = np.asarray(placement.owner)
    skippable = np.bincount(owner[probabilities > 0], minlength=placement.num_ranks)
    layers = np.bincount(owner, minlength=placement.num_ranks).astype(np.float64)
    dense_work = layers + np.array(placement.fixed_work, dtype=np.float64)
    expected = _skipped_per_rank(dense_work, skippable, float(probabilities.sum()))
    changed = np.empty_like(probabilities)
    for rank, count in enumerate(expected):
        changed[owner == rank] = scaled_to_sum(probabilities[owner == rank], count)
    return changed


def _skipped_per_rank(
    dense_work: NDArray[np.float64], skippable: NDArray[np.int_], total: float
) -> NDArray[np.float64]:
    """Waterfilling: clip(dense_work - W, 0, skippable) for the level W at which they sum to ``total``, [ranks].

    The sum falls in straight lines between the levels at which a rank reaches one of its bounds, so that
    interpolation between those finds W exactly.
    """
    levels = np.sort(np.concatenate([dense_work, dense_work - skippable]))[::-1]
    sums = np.clip(dense_work - levels[:, None], 0, skippable).sum(axis=1)
    return np.clip(dense_work - np.interp(total, sums, levels), 0, skippable)


def scaled_to_sum(
    probabilities: NDArray[np.float64], total: float, sizes: NDArray[np.int_] | int = 1
) -> NDArray[np.float64]:
    """min(1, c p) for the factor c that gives ``sizes`` x it the sum ``total``, at most that of the sizes with positive p."""
    scaled, free = np.zeros_like(probabilities), probabilities > 0
    while free.any():
        # Share times total, not p times factor: with tiny probabilities the factor itself may overflow.
        share = probabilities[free] / (sizes * probabilities)[free].sum()
        scaled[free] = share * max(total - (sizes * scaled)[~free].sum(), 0.0)
        above = free & (scaled > 1)
        if not above.any():
            break
        scaled[above], free = 1.0, free & ~above
    return scaled
