"""Ranks that hold the same weights, gradients and masters compare them, bit for bit: silent divergence ends the run and is named."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed as dist

from megatron_sts.launch import trail
from megatron_sts.mcore.buckets import LayerDataParallel
from megatron_sts.mcore.optim import StageOptimizer
from megatron_sts.mcore.replicas import KINDS, NOT_NOW, Copy, checksums, copies
from megatron_sts.train.same import gathered

_DIGEST_BYTES = 8
NUM_SHOWN = 8
"""Ranks that a message lists."""
NUM_TOLD = 100
"""Tensors that ranks tell each other about once some differ."""


class DivergedError(ValueError):
    """Ranks no longer train the same model."""


@dataclass(frozen=True)
class _Held:
    """A tensor as one rank holds it."""

    copy: str
    kind: str
    layer: int | None
    host: str
    checksum: int


class ReplicaCheck:
    """Compares the tensors of a stage every ``interval`` steps, in the first step after a start and in the last of the stage;
    None: never."""

    def __init__(
        self,
        stage: str,
        num_steps: int,
        chunks: Sequence[LayerDataParallel],
        optimizer: StageOptimizer,
        interval: int | None,
    ) -> None:
        self._stage, self._num_steps, self._interval = stage, num_steps, interval
        self._chunks, self._optimizer = chunks, optimizer
        self._places: torch.Tensor | None = None
        self._num_compared = 0
        self.equal_at: int | None = None
        """Before the update of which step all that was compared was last the same."""

    def check(self, step: int) -> None:
        """Between the backward pass and the update of ``step``; a collective if a comparison is due, and of few bytes: one all-reduce.

        Raises:
            DivergedError: on every rank, naming the ranks and the tensor.
        """
        if self._interval is None:
            return
        if self._places is not None and step % self._interval and step + 1 < self._num_steps:
            return
        trail.enter("checksums")
        mine = list(copies(self._chunks, self._optimizer))
        if self._places is None:
            self._agree(mine)
        differing = self._differing(mine)
        if differing:
            raise DivergedError(self._describe(step, self._holders(mine, differing)))
        self.equal_at = step

    def _agree(self, mine: Sequence[Copy]) -> None:
        """Gives every tensor that two ranks or more hold a place in the vector of checksums, the same on all; a collective."""
        digests = [hashlib.blake2b(copy.key.encode(), digest_size=_DIGEST_BYTES).digest() for copy in mine]
        num_holders: dict[bytes, int] = {}
        for held in gathered(b"".join(digests)):
            for start in range(0, len(held), _DIGEST_BYTES):
                digest = held[start : start + _DIGEST_BYTES]
                num_holders[digest] = num_holders.get(digest, 0) + 1
        places = {digest: place for place, digest in enumerate(sorted(d for d, n in num_holders.items() if n > 1))}
        self._num_compared = len(places)
        # The last place is for what no other rank holds.
        self._places = torch.tensor([places.get(digest, len(places)) for digest in digests])

    def _differing(self, mine: Sequence[Copy]) -> set[int]:
        """The places of tensors that ranks hold differently, alike on every rank; a collective."""
        assert self._places is not None
        if not self._num_compared:
            return set()
        found = checksums(self._chunks, mine)
        # Largest and smallest in one reduction; ~x falls as x rises, and has no overflow. NOT_NOW is below everything.
        both = torch.full((2, self._num_compared + 1), NOT_NOW, device=found.device)
        inverted = torch.where(found == NOT_NOW, NOT_NOW, ~found)
        both[:, self._places.to(found.device)] = torch.stack([found, inverted])
        both[:, -1] = NOT_NOW
        dist.all_reduce(both, op=dist.ReduceOp.MAX)
        largest, inverted_smallest = both
        is_held = (largest != NOT_NOW) | (inverted_smallest != NOT_NOW)
        return set((is_held & (largest != ~inverted_smallest)).nonzero().flatten().tolist())

    def _holders(self, mine: Sequence[Copy], differing: set[int]) -> list[dict[int, _Held]]:
        """Of every rank what it holds of them, by place; a collective."""
        assert self._places is not None
        told, host = set(sorted(differing)[:NUM_TOLD]), os.uname().nodename
        values = checksums(self._chunks, mine).tolist()
        held = {
            place: _Held(copy.name, copy.kind, copy.layer, host, value)
            for copy, place, value in zip(mine, self._places.tolist(), values, strict=True)
            if place in differing and value != NOT_NOW
        }
        return gathered({place: one for place, one in held.items() if place in told})

    def _describe(self, step: int, holders: Sequence[dict[int, _Held]]) -> str:
        found = {place: one for held in holders for place, one in held.items()}
        first = min(found, key=lambda place: (KINDS.index(found[place].kind), found[place].copy))
        what = found[first]
        layer = "" if what.layer is None else f" (layer {what.layer})"
        others = f", and in {len(found) - 1} more tensors" if len(found) > 1 else ""
        return (
            f"stage {self._stage}, step {step}: {differing_ranks({r: held[first] for r, held in enumerate(holders) if first in held})} "
            f"in the {what.kind} {what.copy}{layer}{others}; memory, device or a library of that rank may be faulty "
            f"(guard.checksum_interval_steps={self._interval})"
        )


def differing_ranks(held: dict[int, _Held]) -> str:
    """Which ranks differ from which: the fewer from the most, if there are most."""
    by_value: dict[int, list[int]] = {}
    for rank, one in held.items():
        by_value.setdefault(one.checksum, []).append(rank)
    largest, *smaller = sorted(by_value.values(), key=len, reverse=True)
    odd = sorted(rank for ranks in smaller for rank in ranks)

    def named(ranks: Sequence[int]) -> str:
        shown = ", ".join(f"{rank} ({held[rank].host})" for rank in ranks[:NUM_SHOWN])
        more = f" and {len(ranks) - NUM_SHOWN} more" if len(ranks) > NUM_SHOWN else ""
        return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}{more}"

    line = f"{named(odd)} {'differs' if len(odd) == 1 else 'differ'} from {named(sorted(largest))}"
    return (
        line
        if len(largest) > len(smaller[0])
        else f"{line} (with as many on either side nobody can tell which is right)"
    )
