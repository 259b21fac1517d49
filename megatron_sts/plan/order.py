"""The order in which pipeline ranks run their passes: megatron-core's 1F1B and interleaved 1F1B. Torch-free."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Pass:
    """One pass of one micro-batch through one chunk."""

    is_forward: bool
    chunk: int
    """0-based among the rank's chunks."""
    microbatch: int


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
def causal_order(pp: int, vpp: int, num_microbatches: int) -> tuple[tuple[int, Pass, int | None], ...]:
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
