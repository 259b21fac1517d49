"""One training step, top to bottom: mask, images, micro-batches through the pipeline, optimizer, totals."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import distributed as dist

from megatron_sts.cost.balance import Balanced
from megatron_sts.cost.flops import TokenLoad
from megatron_sts.data.batch import Batch
from megatron_sts.data.records import SkippedSample
from megatron_sts.launch import trail
from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask
from megatron_sts.lds.rounds import active_rounds
from megatron_sts.mcore.context import own_tokens
from megatron_sts.mcore.pipeline import ForwardResult, run_microbatches
from megatron_sts.model.loss import masked_loss
from megatron_sts.runtime.clock import Kind
from megatron_sts.runtime.device import current_device
from megatron_sts.train.agreement import check_deal, check_number
from megatron_sts.train.stage import Stage


class NotUpdated(StrEnum):
    """Why a step moved no parameter."""

    NO_TOKEN = "no token to learn from"
    LOSS = "loss not finite"
    GRADIENT = "gradient norm not finite"


@dataclass
class Totals:
    """Sums over the global batch."""

    loss_sum: float
    num_loss_tokens: float
    num_samples: int
    """Those that were used."""
    num_truncated_samples: int
    """Those of them whose end was left out."""
    num_skipped_samples: int
    num_tokens: int
    """Tokens that are not padding, visual ones included."""
    load: TokenLoad
    """What the model computed, padding included."""
    dense_load: TokenLoad
    """The same without VTC."""


@dataclass(frozen=True)
class RankLoad:
    """One copy of the model's part of the global batch."""

    num_tokens: int
    """Tokens that are not padding, visual ones included."""
    load: TokenLoad
    """What it computed, padding included."""


@dataclass(frozen=True)
class StepResult:
    """What one step did; the same on every rank but for its ``own`` load and times."""

    loss: float
    """Mean over the valid tokens of the global batch; NaN when there are none."""
    grad_norm: float
    lr: float
    not_updated: NotUpdated | None
    """Why parameters and moments stayed as they were; None: they moved."""
    mask: SkipMask
    layer_runs: tuple[int, ...]
    """Micro-batches in which each decoder layer really ran, on one data-parallel rank."""
    totals: Totals
    skipped: tuple[SkippedSample, ...]
    """The global batch's samples that could not be used."""
    own: RankLoad
    """What this rank's copy of the model had to do."""
    balanced: Balanced | None
    """With ``batch.balance``, on ranks that read: which copy got which samples."""
    data_wait_s: float
    """How long this rank waited for its samples to be read."""
    spent_s: dict[Kind, float]
    """Where this rank's time went."""

    @property
    def pass_s(self) -> float:
        """How long this rank was at its forward and backward passes."""
        return self.spent_s["forward"] + self.spent_s["backward"]

    @property
    def is_broken(self) -> bool:
        """Whether the step's numbers were not finite."""
        return self.not_updated in (NotUpdated.LOSS, NotUpdated.GRADIENT)


def train_step(stage: Stage, step: int) -> StepResult:
    """Runs step ``step`` of the stage on every rank together."""
    trail.enter("data")
    stage.clock.begin()
    mask, lr = stage.mask(step), stage.optimizer.lr
    with stage.clock.running("data"):
        batches = stage.batches.step(step)
    stage.gate.set(mask, stage.residual_scales(step))
    stage.compression.begin_step()
    with stage.clock.running("optimizer"):
        stage.optimizer.begin_step(mask)
    if stage.tower is not None:
        batches = stage.tower.encode(batches)
    stage.fp8.begin_step()
    device = current_device().torch_device
    trail.enter("between")
    reports = run_microbatches(
        stage.chunks,
        partial(forward, stage.gate),
        enumerate(batch.to(device) for batch in batches),
        num_microbatches=stage.spec.num_microbatches,
        sequence_length=batches[0].sequence_length,
        micro_batch_size=stage.spec.config.batch.micro_batch_size,
        active_rounds=active_rounds(mask, stage.resolved.layers_per_chunk),
        clock=stage.clock,
    )
    stage.fp8.check_order()
    totals, layer_runs = reduce_totals(stage, step, reports, batches)
    not_updated = unlearnable(totals)
    stage.replicas.check(step)
    trail.enter("optimizer")
    with stage.clock.running("optimizer"):
        grad_norm = stage.optimizer.step(mask, applies=not_updated is None)
    if not_updated is None and not math.isfinite(grad_norm):
        not_updated = NotUpdated.GRADIENT
    stage.gate.clear()
    loss = totals.loss_sum / totals.num_loss_tokens if totals.num_loss_tokens else math.nan
    skipped = gather_skipped(stage, batches) if totals.num_skipped_samples else ()
    own = RankLoad(sum(batch.num_tokens for batch in batches), sum((batch.load for batch in batches), TokenLoad()))
    balanced, times = stage.batches.balanced, (stage.batches.wait_s, stage.clock.take())
    return StepResult(loss, grad_norm, lr, not_updated, mask, layer_runs, totals, skipped, own, balanced, *times)


def unlearnable(totals: Totals) -> NotUpdated | None:
    """What the global batch's loss says against an update."""
    if not totals.num_loss_tokens:
        return (
            NotUpdated.NO_TOKEN
        )  # zero gradients would still let Adam's momentum and the weight decay move parameters
    return None if math.isfinite(totals.loss_sum) else NotUpdated.LOSS


def forward(gate: SkipGate, numbered: tuple[int, Batch], unit: torch.nn.Module) -> ForwardResult:
    """One micro-batch through one unit of the schedule, and the loss that the last one applies."""
    microbatch, batch = numbered
    gate.enter(microbatch)
    trail.enter("forward", microbatch)
    output = unit(batch, batch.labels)
    trail.enter("between")
    if output.requires_grad:  # the schedule calls the backward pass, which begins with this gradient
        output.register_hook(lambda _: trail.enter("backward", microbatch))
    return output, partial(masked_loss, loss_mask=own_tokens(batch.loss_mask, 1, batch.packing))


def reduce_totals(
    stage: Stage, step: int, reports: list[dict[str, Any]], batches: list[Batch]
) -> tuple[Totals, tuple[int, ...]]:
    """Sums over the global batch, and how many micro-batches ran each decoder layer, on every rank. One small all-reduce.

    Raises:
        DisagreementError: see ``check_number`` and ``check_deal``.
    """
    trail.enter("reduce")
    device, place = current_device().torch_device, stage.place
    counts = [_counts(batch) for batch in batches]
    first_layer = 3 + len(counts[0])
    values = torch.zeros(first_layer + stage.num_layers + 2, dtype=torch.float64, device=device)
    if place.is_last_stage and place.tp_rank == 0:  # of each context-parallel rank those of its own tokens
        for report in reports:
            values[0] += report["loss_sum"]
            values[1] += report["num_tokens"]
    if place.speaks_for_copy:
        values[2] = len(reports)
        values[3:first_layer] = torch.tensor(counts, dtype=torch.float64).sum(dim=0)
    if place.tp_rank == place.cp_rank == place.dp_rank == 0:
        for layer, num_runs in stage.gate.num_runs.items():
            values[first_layer + layer] = num_runs
    balanced = stage.batches.balanced
    if balanced is not None:
        values[-2], values[-1] = balanced.digest, balanced.digest**2
    with stage.clock.running("pipeline_wait" if stage.place.pp_size > 1 else "communication"):
        dist.all_reduce(values)  # where ranks that have done their passes wait for the others
    loss_sum, num_loss_tokens, num_reports, *whole, digests, squares = values.tolist()
    check_number(stage.spec, step, int(num_reports), len(reports) if place.speaks_for_copy else None, place.dp_size)
    check_deal(stage.spec, step, (int(digests), int(squares)), balanced, place.dp_size)
    samples, cut, skipped, tokens, *rest = map(int, whole)
    num_load = len(fields(TokenLoad))
    load, dense = TokenLoad(*rest[:num_load]), TokenLoad(*rest[num_load : 2 * num_load])
    return Totals(loss_sum, num_loss_tokens, samples, cut, skipped, tokens, load, dense), tuple(rest[2 * num_load :])


def _counts(batch: Batch) -> tuple[int, ...]:
    """What adds up, in the order of ``Totals``."""
    loads = (*astuple(batch.load), *astuple(batch.dense_load))
    return (batch.num_samples, batch.num_truncated, len(batch.skipped), batch.num_tokens, *loads)


def gather_skipped(stage: Stage, batches: list[Batch]) -> tuple[SkippedSample, ...]:
    """What could not be used in the global batch, on every rank; a collective, only for steps that have any."""
    found: list[list[SkippedSample]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(
        found, [one for batch in batches for one in batch.skipped] if stage.place.speaks_for_copy else []
    )
    return tuple(sample for samples in found for sample in samples)
