"""Deals a global batch's samples out to data-parallel ranks by what they cost. Torch-free; reads no samples.

Greedy in the order of falling costs, each to the rank that has least so far and has room left (longest processing time first,
Graham, 1969): every micro-batch holds as many samples, every rank as many micro-batches. Ties go to the lower number, so that
all ranks come to the same.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields, replace

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.tokens import round_up
from megatron_sts.cost.flops import TokenLoad, step_flops

Deal = tuple[tuple[tuple[int, ...], ...], ...]
"""For each rank, for each of its micro-batches: the numbers of its samples within the global batch."""
Cost = Callable[[TokenLoad], int]
"""What a load costs; linear in it."""


@dataclass(frozen=True)
class Balanced:
    """A global batch, dealt out."""

    deal: Deal
    loads_before: tuple[TokenLoad, ...]
    """Of each rank, had the samples been dealt out in order: what ``batch.balance: off`` does."""

    @property
    def digest(self) -> int:
        """16 bits of the deal, by which ranks see that they have come to the same."""
        return zlib.crc32(repr(self.deal).encode()) & 0xFFFF


class Balancer:
    """Deals out the global batches of a stage."""

    def __init__(self, resolved: Resolved, stage: ResolvedStage) -> None:
        self._stage, self._num_ranks, self._cost = stage, resolved.data_parallel_size, flops_of_load(resolved, stage)

    def balance(self, samples: Sequence[TokenLoad], sequence_length: int) -> Balanced:
        """Dealt out so that the rank with most has least; in order where that is no worse.

        Args:
            samples: each one's load in a row without padding, in the order of the global batch; nothing for one that is not used.
            sequence_length: of the step's rows, which only padded ones all have.
        """
        size = self._stage.config.batch.micro_batch_size
        numbers = range(len(samples))
        before = in_order(numbers, self._num_ranks, self._stage.num_microbatches, size)

        def load(chosen: Sequence[int]) -> TokenLoad:
            return self._padded([samples[number] for number in chosen], sequence_length)

        def most(deal: Deal) -> int:
            return max(sum(self._cost(load(micro)) for micro in rank) for rank in deal)

        lengths = [sample.num_tokens for sample in samples] if self._stage.config.batch.packing == "none" else None
        costs = [self._cost(load([number])) for number in numbers]
        micros = alike(lengths, costs, size) if lengths else even(costs, len(samples) // size, size)
        after = dealt(micros, [self._cost(load(micro)) for micro in micros], self._num_ranks)
        # Without balance rows are as long as the longest of all micro-batches of their rank.
        loads = tuple(load([number for micro in rank for number in micro]) for rank in before)
        return Balanced(after if most(after) < most(before) else before, loads)

    def _padded(self, samples: Sequence[TokenLoad], sequence_length: int) -> TokenLoad:
        """What rows of these samples are computed as."""
        if self._stage.config.batch.packing == "none":
            sequence_length = round_up(max(1, *(one.num_tokens for one in samples)), self._stage.token_multiple)
        num_rows = len(samples)
        total = sum(samples, TokenLoad())
        return replace(total, num_tokens=num_rows * sequence_length, num_pairs=num_rows * sequence_length**2)


def flops_of_load(resolved: Resolved, stage: ResolvedStage) -> Cost:
    """Training FLOPs of a load, with all layers: a x tokens + b x pairs + c x images + d x projected tokens."""
    num_layers = resolved.config.model.language.num_layers
    weights = [
        step_flops(resolved, stage, TokenLoad(**{field.name: 1}), layers_executed=num_layers)
        for field in fields(TokenLoad)
    ]
    return lambda load: sum(weight * count for weight, count in zip(weights, astuple(load), strict=True))


def in_order(numbers: Sequence[int], num_ranks: int, num_microbatches: int, size: int) -> Deal:
    """The first ``size`` samples are rank 0's first micro-batch, the next ones rank 1's: as sources are read."""
    starts = [[(micro * num_ranks + rank) * size for micro in range(num_microbatches)] for rank in range(num_ranks)]
    return tuple(tuple(tuple(numbers[start : start + size]) for start in rank) for rank in starts)


def even(costs: Sequence[int], num_groups: int, size: int) -> list[list[int]]:
    """So many groups of ``size`` numbers each, about equal in the sum of their ``costs``; numbers rise within each."""
    groups: list[list[int]] = [[] for _ in range(num_groups)]
    open_groups = [(0, group) for group in range(num_groups)]
    for number in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        cost, group = heapq.heappop(open_groups)
        groups[group].append(number)
        if len(groups[group]) < size:
            heapq.heappush(open_groups, (cost + costs[number], group))
    return [sorted(group) for group in groups]


def alike(lengths: Sequence[int], costs: Sequence[int], size: int) -> list[list[int]]:
    """Groups of ``size`` numbers each of about one length, so that they need little padding; numbers rise within each."""
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], -costs[number], number))
    return [sorted(order[start : start + size]) for start in range(0, len(order), size)]


def dealt(micros: Sequence[Sequence[int]], costs: Sequence[int], num_ranks: int) -> Deal:
    """Micro-batches to ranks, as many to each, by the micro-batches' ``costs``; each rank's from the dearest to the cheapest, so
    that all ranks have theirs at the same time."""
    of_ranks = even(costs, num_ranks, len(micros) // num_ranks)
    falling = (sorted(rank, key=lambda micro: (-costs[micro], micro)) for rank in of_ranks)
    return tuple(tuple(tuple(micros[micro]) for micro in rank) for rank in falling)
