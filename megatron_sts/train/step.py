"""One training step, top to bottom: mask, micro-batches through the pipeline, optimizer, totals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import distributed as dist

from megatron_sts.data.batch import Batch
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
    totals: Totals


def train_step(stage: Stage, step: int) -> StepResult:
    """Runs step ``step`` of the stage on every rank together."""
    mask, counted, lr = stage.mask(step), Totals(), stage.optimizer.lr
    stage.gate.set(mask)
    stage.optimizer.zero_grad()
    reports = run_microbatches(
        stage.chunks,
        forward,
        count(stage.batches.step(step), counted),
        num_microbatches=stage.spec.num_microbatches,
        sequence_length=stage.spec.sequence_length,
        micro_batch_size=stage.spec.config.batch.micro_batch_size,
    )
    grad_norm = stage.optimizer.step(skipped_layers=[i for i, skipped in enumerate(mask.skipped) if skipped])
    stage.gate.clear()
    totals = reduce_totals(stage, reports, counted)
    loss = totals.loss_sum / totals.num_loss_tokens if totals.num_loss_tokens else math.nan
    return StepResult(loss, grad_norm, lr, math.isfinite(grad_norm), mask, totals)


def forward(batch: Batch, chunk: torch.nn.Module) -> ForwardResult:
    """One micro-batch through one model chunk, and the loss that the last one applies."""
    return chunk(batch, batch.labels), partial(masked_loss, loss_mask=batch.loss_mask)


def count(batches: Iterable[Batch], into: Totals) -> Iterator[Batch]:
    """Passes batches on and counts what they hold."""
    for batch in batches:
        into.num_tokens += batch.num_tokens
        into.num_images += batch.num_images
        into.num_skipped_samples += batch.num_skipped
        yield batch


def reduce_totals(stage: Stage, reports: list[dict[str, Any]], counted: Totals) -> Totals:
    """Sums over the global batch on every rank: each last stage contributes once. One small all-reduce."""
    device, place = current_device().torch_device, stage.place
    values = torch.zeros(len(fields(Totals)), dtype=torch.float64, device=device)
    if place.is_last_stage and place.tp_rank == 0:
        for report in reports:
            values[0] += report["loss_sum"]
            values[1] += report["num_tokens"]
        values[2:] = torch.tensor([counted.num_tokens, counted.num_images, counted.num_skipped_samples])
    dist.all_reduce(values)
    return Totals(*values.tolist())
