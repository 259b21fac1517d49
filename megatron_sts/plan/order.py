"""The order of all passes of a pipeline: each behind what it needs. Torch-free."""

from __future__ import annotations

import functools

from megatron_sts.cost.pass_order import Pass, pass_order


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
