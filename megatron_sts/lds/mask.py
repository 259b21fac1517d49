"""Which layers a step skips: a pure function of seed, stage and step, and of the layout only where balance asks it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.schema import LdsConfig
from megatron_sts.lds.effective import effective_probabilities
from megatron_sts.lds.placement import Placement
from megatron_sts.lds.round_sampler import round_sampler
from megatron_sts.lds.samplers import balanced, bernoulli, stratified_offsets
from megatron_sts.lds.schedule import skip_probabilities

STREAM = 1
"""Last counter word: keeps these draws apart from those of other rooms that share seed and stage."""
LAYOUT_SAMPLERS = ("balanced", "quota")
"""Samplers whose masks depend on which pipeline rank owns which layer."""
ASCII = bytes.maketrans(b"\0\1", b"01")


@dataclass(frozen=True)
class SkipMask:
    """The layers (0-based) that every rank skips in one step."""

    stage: int
    step: int
    rows: tuple[tuple[bool, ...], ...]
    """[micro-batches, layers], True where skipped; a single row holds for every micro-batch."""

    @property
    def num_layers(self) -> int:
        return len(self.rows[0])

    def row(self, microbatch: int) -> tuple[bool, ...]:
        """What one micro-batch (0-based within the step, the same for all data-parallel ranks) skips."""
        return self.rows[microbatch] if len(self.rows) > 1 else self.rows[0]

    @cached_property
    def idle(self) -> tuple[bool, ...]:
        """The layers that no micro-batch of the step runs."""
        return tuple(all(column) for column in zip(*self.rows, strict=True))

    @property
    def num_skipped(self) -> float:
        """Layers skipped, in the mean over micro-batches."""
        return sum(map(sum, self.rows)) / len(self.rows)

    def running_all_first(self, num_microbatches: int) -> SkipMask:
        """The same, but for the step's first micro-batch, which runs every layer."""
        rows = [(False,) * self.num_layers, *(self.row(microbatch) for microbatch in range(1, num_microbatches))]
        return SkipMask(self.stage, self.step, tuple(rows))

    @property
    def digest(self) -> str:
        """16 hex digits of SHA-256 over stage, step and bits, for logs and comparisons."""
        bits = b"/".join(bytes(row).translate(ASCII) for row in self.rows)
        return hashlib.sha256(f"{self.stage}:{self.step}:".encode() + bits).hexdigest()[:16]


def draw_mask(
    lds: LdsConfig, seed: int, stage: int, step: int, num_steps: int, placement: Placement, num_microbatches: int = 1
) -> SkipMask:
    """The mask of ``step`` = 0 ... num_steps - 1: one row, or with ``granularity: microbatch`` one a micro-batch.

    ``bernoulli`` and ``fixed`` use nothing of the placement but the number of layers, and their row m is the same
    however many micro-batches there are. ``balanced`` and ``quota`` follow the pipeline ranks' layers and their rounds;
    ``rounds`` has one row, and follows them unless it has a number of blocks of its own.

    Philox with key (seed, stage) and the counter set by step and row. Raw output only, which NumPy keeps stable over
    versions and platforms (its distribution methods may change).
    """
    if lds.sampler == "rounds":
        sampler = round_sampler(lds, skip_probabilities(lds, step, num_steps, placement.num_layers), placement)
        return SkipMask(stage, step, (tuple(sampler.draw(_random_words(seed, stage, step, 0, 2)).tolist()),))
    probabilities = effective_probabilities(lds, step, num_steps, placement)
    num_rows, num_layers = num_microbatches if lds.granularity == "microbatch" else 1, placement.num_layers
    num_words = num_layers + 2 + placement.num_rounds
    words = np.stack([_random_words(seed, stage, step, row, num_words) for row in range(num_rows)])
    of_layers, of_offsets, of_rounds = np.split(words, [num_layers, num_layers + 2], axis=1)
    if lds.sampler in LAYOUT_SAMPLERS:
        owner, rounds = np.asarray(placement.owner), np.asarray(placement.round)
        skipped = balanced(probabilities, owner, rounds, of_layers, of_rounds, stratified_offsets(of_offsets))
    else:
        skipped = bernoulli(probabilities, of_layers)
    return SkipMask(stage, step, tuple(map(tuple, skipped.tolist())))


def dense_mask(stage: int, step: int, num_layers: int) -> SkipMask:
    """The mask of a step that skips nothing."""
    return SkipMask(stage, step, ((False,) * num_layers,))


def _random_words(seed: int, stage: int, step: int, row: int, count: int) -> NDArray[np.uint64]:
    """``count`` x 64 random bits; fewer are the first of more."""
    return np.random.Philox(key=[seed, stage], counter=[0, step, row, STREAM]).random_raw(count)
