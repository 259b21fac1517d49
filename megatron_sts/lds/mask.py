"""Which layers one step skips: a pure function of seed, stage and step, whatever the parallel layout."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megatron_sts.config.schema import LdsConfig
from megatron_sts.lds.schedule import skip_probabilities

STREAM = 1
"""Last counter word: keeps these draws apart from those of other rooms that share seed and stage."""


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

    @property
    def digest(self) -> str:
        """16 hex digits of SHA-256 over stage, step and bits, for logs and comparisons."""
        bits = "/".join("".join("01"[skip] for skip in row) for row in self.rows)
        return hashlib.sha256(f"{self.stage}:{self.step}:{bits}".encode()).hexdigest()[:16]


def draw_mask(lds: LdsConfig, seed: int, stage: int, step: int, num_steps: int, num_layers: int) -> SkipMask:
    """Skips layer l when its uniform number u_l < p_l(step), independently of other layers and steps.

    Philox with key (seed, stage) and the counter set by the step. Raw output only, which NumPy keeps stable over
    versions and platforms (its distribution methods may change): u = 53 upper bits / 2^53.
    """
    probabilities = skip_probabilities(lds, step, num_steps, num_layers)
    raw = np.random.Philox(key=[seed, stage], counter=[0, step, 0, STREAM]).random_raw(num_layers)
    uniform = (raw >> np.uint64(11)) * 2.0**-53
    return SkipMask(stage, step, (tuple((uniform < probabilities).tolist()),))


def dense_mask(stage: int, step: int, num_layers: int) -> SkipMask:
    """The mask of a step that skips nothing."""
    return SkipMask(stage, step, ((False,) * num_layers,))
