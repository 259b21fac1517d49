"""A step of the (interleaved) 1F1B schedule, pass by pass: who computes when, who waits. Torch-free; knows only durations.

The order of passes is megatron-core's (``cost.pass_order``). A pass begins when its rank is free and its input has come; a
transfer takes time, and without ``overlap_p2p_comm`` its sender waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sts.cost.pass_order import Pass
from megatron_sts.plan.order import causal_order

Seconds = NDArray[np.float64]
SIMULATED_GROUPS = 8
"""Groups of pp micro-batches that are simulated one by one."""


@dataclass(frozen=True)
class Durations:
    """Of passes, in seconds, [..., rows, vpp, pp]: chunk v of pipeline rank p; one row for all micro-batches or one for each."""

    forward: Seconds
    backward: Seconds
    send_s: float = 0.0
    """A transfer between neighbouring ranks."""
    sender_waits: bool = False


@dataclass(frozen=True)
class Event:
    """One pass in a timeline."""

    rank: int
    what: Pass
    start_s: float
    end_s: float


def step_seconds(durations: Durations, num_microbatches: int) -> Seconds:
    """From the first pass to the end of the last, [...].

    Exact up to ``SIMULATED_GROUPS`` x pp micro-batches; each more takes the mean of the second half of those, but at least
    what the slowest rank computes.
    """
    most = SIMULATED_GROUPS * durations.forward.shape[-1]
    if num_microbatches <= most:
        return _end(durations, num_microbatches)
    whole, half = _end(durations, most), _end(durations, most // 2)
    slowest = (durations.forward + durations.backward).mean(axis=-3).sum(axis=-2).max(axis=-1)
    return np.asarray(whole + (num_microbatches - most) * np.maximum((whole - half) / (most - most // 2), slowest))


def timeline(durations: Durations, num_microbatches: int) -> list[Event]:
    """Every pass of one step, in an order in which each follows what it needs. ``durations``: of one step, [rows, vpp, pp]."""
    return [
        Event(rank, each, float(end[0] - length[0]), float(end[0]))
        for rank, each, length, end in _passes(durations, num_microbatches)
    ]


def idle_share(durations: Durations, num_microbatches: int) -> Seconds:
    """Of the ranks' time in a step, what they wait, [...]."""
    each = (durations.forward + durations.backward).mean(axis=-3).sum(axis=-2).mean(axis=-1)
    return np.asarray(np.maximum(1 - num_microbatches * each / step_seconds(durations, num_microbatches), 0))


def _end(durations: Durations, num_microbatches: int) -> Seconds:
    ends = [end for *_, end in _passes(durations, num_microbatches)]
    return np.asarray(np.max(ends, axis=0).reshape(durations.forward.shape[:-3]))


def _passes(durations: Durations, num_microbatches: int) -> list[tuple[int, Pass, Seconds, Seconds]]:
    """(rank, pass, duration, end), the last two for every outcome, [outcomes]."""
    rows, vpp, pp = durations.forward.shape[-3:]
    lengths = {
        is_forward: np.ascontiguousarray(np.moveaxis(all_of_them.reshape(-1, rows, vpp, pp), 0, -1))
        for is_forward, all_of_them in ((True, durations.forward), (False, durations.backward))
    }
    free = list(np.zeros((pp, lengths[True].shape[-1])))
    passes: list[tuple[int, Pass, Seconds, Seconds]] = []
    for rank, each, needed in causal_order(pp, vpp, num_microbatches):
        start, length = free[rank], lengths[each.is_forward][each.microbatch % rows, each.chunk, rank]
        if needed is not None:
            sender, *_, sent = passes[needed]
            start = np.maximum(start, sent + (durations.send_s if sender != rank else 0.0))
        end = start + length
        passes.append((rank, each, length, end))
        free[rank] = end + durations.send_s if durations.sender_waits and pp > 1 else end
    return passes
