"""How long a pipeline takes for one step, from what its chunks compute. Torch-free; knows nothing of FLOPs or of skipping.

Times are in units of the work that is put in. Transfers cost nothing and never block a sender; a chunk's backward pass
takes twice its forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FORWARD_SHARE = 1 / 3
"""Of a chunk's work: a training layer computes two products in the backward pass for each one in the forward pass."""
SIMULATED_GROUPS = 8
"""Groups of pp micro-batches that are simulated one by one."""


@dataclass(frozen=True)
class Pass:
    """One pass of one micro-batch through one chunk."""

    is_forward: bool
    chunk: int
    """0-based among the rank's chunks."""
    microbatch: int


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
    pp = work.shape[-1]
    most = SIMULATED_GROUPS * pp
    if num_microbatches <= most:
        return _simulate(work, num_microbatches)
    whole, half = _simulate(work, most), _simulate(work, most // 2)
    slowest = work.mean(axis=-3).sum(axis=-2).max(axis=-1)
    each = np.maximum((whole - half) / (most - most // 2), slowest)
    return np.asarray(whole + (num_microbatches - most) * each)


def _simulate(work: NDArray[np.float64], num_microbatches: int) -> NDArray[np.float64]:
    rows, vpp, pp = work.shape[-3:]
    durations = np.ascontiguousarray(np.moveaxis(work.reshape(-1, rows, vpp, pp), 0, -1))
    shares = {True: FORWARD_SHARE * durations, False: (1 - FORWARD_SHARE) * durations}
    free = list(np.zeros((pp, durations.shape[-1])))
    ends: list[NDArray[np.float64]] = []
    for rank, each, needed in _in_causal_order(pp, vpp, num_microbatches):
        start = free[rank] if needed is None else np.maximum(free[rank], ends[needed])
        free[rank] = start + shares[each.is_forward][each.microbatch % rows, each.chunk, rank]
        ends.append(free[rank])
    return np.asarray(np.max(free, axis=0).reshape(work.shape[:-3]))


def pass_order(rank: int, pp: int, vpp: int, num_microbatches: int) -> list[Pass]:
    """The order in which a pipeline rank runs its passes: warm-up, one forward one backward, cool-down.

    Interleaved (vpp > 1), micro-batches go through the rank's chunks in groups of pp.
    """
    forward = list(_by_groups(pp, vpp, num_microbatches))
    backward = [Pass(False, vpp - 1 - each.chunk, each.microbatch) for each in forward]
    num_warmup = (pp - rank - 1) * 2 + (vpp - 1) * pp if vpp > 1 else pp - rank - 1
    num_warmup = min(num_warmup, len(forward))
    order = forward[:num_warmup]
    for one, other in zip(forward[num_warmup:], backward, strict=False):
        order += [one, other]
    return order + backward[len(forward) - num_warmup :]


def _by_groups(pp: int, vpp: int, num_microbatches: int) -> Iterator[Pass]:
    for start in range(0, num_microbatches, pp):
        for chunk in range(vpp):
            for microbatch in range(start, min(start + pp, num_microbatches)):
                yield Pass(True, chunk, microbatch)


def _needs(rank: int, each: Pass, pp: int, vpp: int) -> tuple[int, Pass] | None:
    """The pass whose result this one works on; None for the first chunk's forward pass."""
    number = each.chunk * pp + rank
    if each.is_forward:
        previous = number - 1
        return None if number == 0 else (previous % pp, Pass(True, previous // pp, each.microbatch))
    if number == vpp * pp - 1:
        return rank, Pass(True, each.chunk, each.microbatch)
    following = number + 1
    return following % pp, Pass(False, following // pp, each.microbatch)


@functools.lru_cache(maxsize=64)
def _in_causal_order(pp: int, vpp: int, num_microbatches: int) -> tuple[tuple[int, Pass, int | None], ...]:
    """(rank, pass, place in this tuple of the pass it needs): behind that one and behind those before it on its rank."""
    waiting = [pass_order(rank, pp, vpp, num_microbatches)[::-1] for rank in range(pp)]
    places: dict[tuple[int, Pass], int] = {}
    order: list[tuple[int, Pass, int | None]] = []
    while any(waiting):
        before = len(order)
        for rank, passes in enumerate(waiting):
            while passes and ((needed := _needs(rank, passes[-1], pp, vpp)) is None or needed in places):
                place = None if needed is None else places[needed]
                each = passes.pop()
                places[rank, each] = len(order)
                order.append((rank, each, place))
        if len(order) == before:
            raise ValueError(f"{num_microbatches} micro-batches in {vpp} chunks on {pp} ranks: the order deadlocks")
    return tuple(order)
