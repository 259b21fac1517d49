"""How long a pipeline takes for one step, from what its chunks compute. Torch-free; knows nothing of FLOPs or of skipping.

Times are in units of the work that is put in. Transfers cost nothing and never block a sender; a chunk's backward pass
takes twice its forward pass.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_sts.plan.timeline import Durations, step_seconds

FORWARD_SHARE = 1 / 3
"""Of a chunk's work: a training layer computes two products in the backward pass for each one in the forward pass."""


def bottleneck_time(work: NDArray[np.float64], num_microbatches: int) -> NDArray[np.float64]:
    """Time of a step, [...], if the slowest pipeline rank waits only while the pipeline fills and drains.

    ``work`` [..., rows, vpp, pp]: what chunk v of rank p computes for a micro-batch, forward and backward; one row for
    all micro-batches or one for each. The slowest rank works off all micro-batches; before and after, one of them passes
    the other ranks' share of one of the vpp rounds: m max_p w_p + (sum_p w_p - max_p w_p)/vpp. For equal chunks that is
    m t + (pp-1) t/vpp, the interleaved 1F1B schedule (Narayanan et al., arXiv 2104.04473). For unequal ones it leaves
    out that ranks wait for each other's chunks: ``schedule_time`` does not.
    """
    of_ranks = work.mean(axis=-3).sum(axis=-2)
    slowest = of_ranks.max(axis=-1)
    return np.asarray(num_microbatches * slowest + (of_ranks.sum(axis=-1) - slowest) / work.shape[-2])


def schedule_time(work: NDArray[np.float64], num_microbatches: int) -> NDArray[np.float64]:
    """Time of a step, [...], with every pass of megatron-core's (interleaved) 1F1B order in its place.

    ``work`` as for ``bottleneck_time``; with several chunks a rank the micro-batches are a multiple of pp. Exact up to
    ``SIMULATED_GROUPS`` x pp micro-batches; of more, the others take the mean time of the second half of those, but at
    least what the slowest rank computes.
    """
    return step_seconds(Durations(FORWARD_SHARE * work, (1 - FORWARD_SHARE) * work), num_microbatches)
