"""For benchmarks: a stage's training step on given micro-batches and, if asked, with a given mask; and its seconds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_sts.data.batch import Batch
from megatron_sts.lds.mask import SkipMask
from megatron_sts.runtime.device import current_device
from megatron_sts.train.stage import Stage
from megatron_sts.train.step import train_step


@dataclass(frozen=True)
class GivenBatches:
    """In place of a stage's data: these in every step."""

    batches: Sequence[Batch]
    wait_s: float = 0.0
    balanced: None = None

    def step(self, _step: int) -> Sequence[Batch]:
        return self.batches


@dataclass(frozen=True)
class GivenMask:
    """In place of a stage's mask plan: this one in every step."""

    given: SkipMask

    def mask(self, _step: int) -> SkipMask:
        return self.given

    def residual_scales(self, _step: int) -> None:
        return None


def step_seconds(stage: Stage, batches: Sequence[Batch], mask: SkipMask | None = None) -> float:
    """One training step on this rank; without ``mask`` with the stage's own."""
    given: dict[str, Any] = {"batches": GivenBatches(batches)}
    if mask is not None:
        given["masks"] = GivenMask(mask)
    fixed = replace(stage, **given)
    started = time.perf_counter()
    train_step(fixed, 0)
    current_device().synchronize()
    return time.perf_counter() - started
