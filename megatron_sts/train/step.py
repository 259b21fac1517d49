"""One training step, top to bottom: mask, micro-batches through the pipeline, optimizer, totals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import distributed as dist

from megatron_sts.data.batch import Batch
from megatron_sts.data.records import SkippedSample
from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask
from megatron_sts.mcore.pipeline import ForwardResult, run_microbatches
from megatron_sts.model.loss import masked_loss
from megatron_sts.runtime.device import current_device
from megatron_sts.train.stage import Stage


@dataclass
class Totals:
    """Sums over the global batch."""

    loss_sum: float = 0.0
    num_loss_tokens: float = 0.0
    num_tokens: float = 0.0
    """Tokens that are not padding, visual ones included."""
    num_images: float = 0.0
    num_skipped_samples: float = 0.0


@dataclass
class Counted:
    """What this rank saw of a step's samples."""

    num_tokens: int = 0
    num_images: int = 0
    skipped: list[SkippedSample] = field(default_factory=list)


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank."""

    loss: float
    """Mean over the valid tokens of the global batch; NaN when there are none."""
    grad_norm: float
    lr: float
    updated: bool
    """False when the gradient was not finite: parameters and moments stayed as they were."""
    mask: SkipMask
    layer_runs: tuple[int, ...]
    """Micro-batches in which each decoder layer really ran, on one data-parallel rank."""
    totals: Totals
    skipped: tuple[SkippedSample, ...]
    """The global batch's samples that could not be used."""


def train_step(stage: Stage, step: int) -> StepResult:
    """Runs step ``step`` of the stage on every rank together."""
    mask, counted, lr = stage.mask(step), Counted(), stage.optimizer.lr
    stage.gate.set(mask, stage.residual_scales(step))
    stage.optimizer.begin_step(mask)
    reports = run_microbatches(
        stage.chunks,
        partial(forward, stage.gate),
        enumerate(count(stage.batches.step(step), counted)),
        num_microbatches=stage.spec.num_microbatches,
        sequence_length=stage.spec.sequence_length,
        micro_batch_size=stage.spec.config.batch.micro_batch_size,
    )
    grad_norm = stage.optimizer.step(mask)
    totals, layer_runs = reduce_totals(stage, reports, counted)
    stage.gate.clear()
    loss = totals.loss_sum / totals.num_loss_tokens if totals.num_loss_tokens else math.nan
    skipped = gather_skipped(stage, counted) if totals.num_skipped_samples else ()
    return StepResult(loss, grad_norm, lr, math.isfinite(grad_norm), mask, layer_runs, totals, skipped)


def forward(gate: SkipGate, numbered: tuple[int, Batch], chunk: torch.nn.Module) -> ForwardResult:
    """One micro-batch through one model chunk, and the loss that the last one applies."""
    microbatch, batch = numbered
    gate.enter(microbatch)
    return chunk(batch, batch.labels), partial(masked_loss, loss_mask=batch.loss_mask)


def count(batches: Iterable[Batch], into: Counted) -> Iterator[Batch]:
    """Passes batches on and counts what they hold."""
    for batch in batches:
        into.num_tokens += batch.num_tokens
        into.num_images += batch.num_images
        into.skipped += batch.skipped
        yield batch


def reduce_totals(stage: Stage, reports: list[dict[str, Any]], counted: Counted) -> tuple[Totals, tuple[int, ...]]:
    """Sums over the global batch, and how many micro-batches ran each decoder layer, on every rank. One small all-reduce."""
    device, num_totals = current_device().torch_device, len(fields(Totals))
    values = torch.zeros(num_totals + stage.num_layers, dtype=torch.float64, device=device)
    if speaks(stage):
        for report in reports:
            values[0] += report["loss_sum"]
            values[1] += report["num_tokens"]
        values[2:num_totals] = torch.tensor([counted.num_tokens, counted.num_images, len(counted.skipped)])
    if stage.place.tp_rank == stage.place.dp_rank == 0:
        for layer, num_runs in stage.gate.num_runs.items():
            values[num_totals + layer] = num_runs
    dist.all_reduce(values)
    reduced = values.tolist()
    return Totals(*reduced[:num_totals]), tuple(int(count) for count in reduced[num_totals:])


def gather_skipped(stage: Stage, counted: Counted) -> tuple[SkippedSample, ...]:
    """What could not be used in the global batch, on every rank; a collective, only for steps that have any."""
    found: list[list[SkippedSample]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, counted.skipped if speaks(stage) else [])
    return tuple(sample for samples in found for sample in samples)


def speaks(stage: Stage) -> bool:
    """Whether this rank counts for its data-parallel rank: one of those that compute the loss, and so look at everything."""
    return stage.place.is_last_stage and stage.place.tp_rank == 0
