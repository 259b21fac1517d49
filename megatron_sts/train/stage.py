"""Everything that exists for the length of one stage: what trains, its optimizer, its data, its skip masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed as dist

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask, dense_mask
from megatron_sts.lds.placement import placement
from megatron_sts.lds.sync import MaskPlan
from megatron_sts.mcore.fp8 import Fp8Modules, leave_fp8
from megatron_sts.mcore.groups import Place
from megatron_sts.mcore.module import unwrap
from megatron_sts.mcore.optim import StageOptimizer, wrap_data_parallel
from megatron_sts.model.compression import Compression, build_compression
from megatron_sts.model.spread import SpreadTower, build_spread_tower
from megatron_sts.runtime.clock import StepClock
from megatron_sts.runtime.device import current_device
from megatron_sts.train.batches import StageBatches
from megatron_sts.train.replicas import ReplicaCheck


@dataclass(frozen=True)
class Stage:
    """A stage on this rank."""

    resolved: Resolved
    spec: ResolvedStage
    place: Place
    chunks: Sequence[torch.nn.Module]
    """This rank's model chunks, wrapped in DDP."""
    optimizer: StageOptimizer
    batches: StageBatches
    gate: SkipGate
    masks: MaskPlan | None
    fp8: Fp8Modules
    compression: Compression
    tower: SpreadTower | None
    """What encodes a step's images before its passes; None: the first stage does in its passes."""
    replicas: ReplicaCheck
    clock: StepClock

    @property
    def num_layers(self) -> int:
        """Decoder layers of the whole model."""
        return self.resolved.config.model.language.num_layers

    @property
    def is_last(self) -> bool:
        """Whether no stage follows."""
        return self.spec.index + 1 == len(self.resolved.stages)

    def mask(self, step: int) -> SkipMask:
        """The step's skip mask; a collective at the first step of each block.

        Delayed scaling finds a layer's scales by the order in which layers first ran in this process. So its first
        micro-batch runs all of them, after a restart too.
        """
        if self.masks is None:
            return dense_mask(self.spec.index, step, self.num_layers)
        mask = self.masks.mask(step)
        is_ordering = self.resolved.config.precision.fp8 == "delayed" and not self.gate.has_started
        return mask.running_all_first(self.spec.num_microbatches) if is_ordering else mask

    def close(self) -> None:
        """Ends the stage: parameters whole on every rank (a collective), nothing read ahead any more."""
        self.batches.close()
        self.compression.close()
        self.optimizer.close()

    def residual_scales(self, step: int) -> Sequence[float] | None:
        """For each decoder layer, what its contribution to the residual stream is multiplied by; None: 1."""
        return None if self.masks is None else self.masks.residual_scales(step)


def build_stage(
    resolved: Resolved,
    spec: ResolvedStage,
    place: Place,
    chunks: Sequence[torch.nn.Module],
    gate: SkipGate,
    batches: StageBatches | None = None,
) -> Stage:
    """Freezes what the stage freezes, then builds DDP and the optimizer over the rest. ``batches``: None: the stage's data."""
    set_trainable(chunks, spec.config.freeze)
    leave_fp8(chunks, spec.bf16_products)
    compression = build_compression(resolved, spec)
    for chunk in map(unwrap, chunks):
        chunk.compression = compression
    clock = StepClock()
    wrapped = wrap_data_parallel(resolved, chunks, clock)
    optimizer = StageOptimizer(resolved, spec, wrapped, clock)
    return Stage(
        resolved=resolved,
        spec=spec,
        place=place,
        chunks=wrapped,
        optimizer=optimizer,
        batches=StageBatches(resolved, spec, place) if batches is None else batches,
        gate=gate,
        masks=build_masks(resolved, spec) if spec.config.lds else None,
        fp8=Fp8Modules(chunks, watch_order=resolved.config.precision.fp8 == "delayed" and not gate.has_started),
        compression=compression,
        tower=build_spread_tower(resolved, spec, chunks, compression, clock),
        replicas=ReplicaCheck(
            spec.name, spec.num_steps, wrapped, optimizer, resolved.config.guard.checksum_interval_steps
        ),
        clock=clock,
    )


def build_masks(resolved: Resolved, spec: ResolvedStage) -> MaskPlan:
    """The stage's skip masks, agreed on by all ranks of the run."""
    assert spec.config.lds is not None
    return MaskPlan(
        spec.config.lds,
        resolved.config.seed,
        spec.index,
        spec.num_steps,
        placement(resolved, spec),
        spec.num_microbatches,
        group=dist.group.WORLD,
        device=current_device().torch_device,
    )


def set_trainable(chunks: Sequence[torch.nn.Module], frozen: Sequence[str]) -> None:
    """Parameters learn unless their part (vision, qformer, projector, language) is in ``frozen``."""
    for chunk in map(unwrap, chunks):
        for name, parameter in chunk.named_parameters():
            parameter.requires_grad_(name.split(".", 1)[0] not in frozen)
