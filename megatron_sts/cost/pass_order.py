"""Which chunks a pipeline schedule runs, and the order of a rank's passes. Torch-free; knows neither times nor bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


def grouped(num_rounds: int, active: Sequence[int]) -> list[list[int]]:
    """The rounds of each unit. An idle first round joins the first active one, an idle last round the last one, as
    embedding and head run in every step; idle rounds between are in no unit. Without an active round there is one unit."""
    groups = [[number] for number in active] or [[]]
    if 0 not in groups[0]:
        groups[0].insert(0, 0)
    if num_rounds - 1 not in groups[-1]:
        groups[-1].append(num_rounds - 1)
    return groups
