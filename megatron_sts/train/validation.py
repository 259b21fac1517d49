"""The validation loss: what the model, as it will be used, makes of samples that it is not trained on.

Dense, because inference is: every layer runs and every visual token is seen, whatever the stage skips and compresses. Nothing is
left behind that a later step could notice: no gradient, no random number drawn, no scale of FP8, no time of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import distributed as dist

from megatron_sts.config.resolve import ResolvedStage
from megatron_sts.data.batch import Batch
from megatron_sts.data.records import RecordSource, SkippedSample
from megatron_sts.evaluate.scenes import inference
from megatron_sts.launch import trail
from megatron_sts.mcore.context import own_tokens
from megatron_sts.mcore.pipeline import ForwardResult, run_microbatches
from megatron_sts.runtime.device import current_device
from megatron_sts.runtime.dist import max_over_ranks
from megatron_sts.runtime.memory import take_apart
from megatron_sts.train.costs import finite_or_none
from megatron_sts.train.held_out import HeldOutBatches, open_samples
from megatron_sts.train.interrupt import StopRequest
from megatron_sts.train.metrics import RunLog
from megatron_sts.train.resume import Progress
from megatron_sts.train.stage import Stage
from megatron_sts.train.step import gather_skipped


@dataclass(frozen=True)
class Validated:
    """What one validation found; the same on every rank."""

    loss: float
    """Mean over the tokens that count of all samples; NaN where there are none."""
    num_tokens: int
    """Those."""
    num_samples: int
    """Those that were used."""
    skipped: tuple[SkippedSample, ...]
    """Those that could not be."""


class Validator:
    """Validates a stage when its config says so."""

    def __init__(self, stage: Stage, log: RunLog) -> None:
        self._stage, self._log = stage, log
        self._spec = as_validated(stage.spec)
        self._source: RecordSource | None = None
        self._told: set[SkippedSample] = set()

    def is_due(self, step: int) -> bool:
        """Whether to validate once ``step`` steps are done."""
        settings = self._stage.spec.config.validation
        return settings is not None and (step % settings.interval_steps == 0 or step == self._stage.spec.num_steps)

    def after_step(self, progress: Progress, stop: StopRequest) -> tuple[Progress, float]:
        """Validates if that is due, and notes the loss in the progress; a collective. Also the number of a signal that asked for a
        stop meanwhile, 0 without one: the run is to save then, not to wait."""
        if not self.is_due(progress.step):
            return progress, 0.0
        started, name = time.perf_counter(), self._stage.spec.name
        (found, stopping), peak_bytes = take_apart(partial(self.validate, stop))
        self._stage.clock.take()  # what was timed meanwhile is not the next step's
        if found is None:
            return progress, stopping
        for sample in found.skipped:
            if sample not in self._told:
                self._told.add(sample)
                self._log.warn(f"validation of stage {name} does without sample {sample.key}: {sample.reason}")
        [most_bytes, seconds] = max_over_ranks([peak_bytes, time.perf_counter() - started])
        loss = finite_or_none(found.loss)
        line = {"stage": name, "step": progress.step, "loss": loss, "loss_tokens": found.num_tokens}
        line |= {"samples": found.num_samples, "samples_skipped": len(found.skipped)}
        self._log.validation({**line, "seconds": round(seconds, 6), "peak_memory_bytes": int(most_bytes)})
        return replace(progress, validation_loss=loss), stopping

    def validate(self, stop: StopRequest | None = None) -> tuple[Validated | None, float]:
        """One pass over the samples; a collective. And the number of a signal that asks for a stop, if one came: before all were
        seen, it found nothing."""
        stage, spec = self._stage, self._spec
        assert spec.held_out is not None
        if self._source is None and stage.place.is_first_of_copy:
            self._source = open_samples(stage.resolved, spec.held_out)
        totals = torch.zeros(4, dtype=torch.float64, device=current_device().torch_device)
        skipped: list[Batch] = []
        stage.optimizer.gather_params()  # layers that the last step skipped may be stale here
        rounds = HeldOutBatches(stage.resolved, spec, stage.place, self._source)
        with closing(rounds), inference(stage.chunks, stage.gate), stage.fp8.kept():
            number, is_left, stopping = 0, 1.0, 0.0
            while is_left and not stopping:
                trail.at_round(number)
                trail.enter("data")
                batches = rounds.round(number)
                totals += self._sums(batches)
                skipped += [replace(batch, pixels=None) for batch in batches if batch.skipped]
                trail.enter("validation")
                number += 1
                is_left, stopping = max_over_ranks([not rounds.is_over, 0 if stop is None else stop.received])
        if is_left:
            return None, stopping
        dist.all_reduce(totals)
        loss_sum, num_tokens, num_samples, num_skipped = totals.tolist()
        loss = loss_sum / num_tokens if num_tokens else math.nan
        left_out = gather_skipped(stage, skipped) if num_skipped else ()
        return Validated(loss, int(num_tokens), int(num_samples), left_out), stopping

    def _sums(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Of a round's micro-batches: this rank's part of the loss, of the tokens, of samples used and of those left out, float64 [4]."""
        device, place = current_device().torch_device, self._stage.place
        if self._stage.tower is not None:
            batches = self._stage.tower.encode(batches)
        reports = run_microbatches(
            self._stage.chunks,
            forward,
            (batch.to(device) for batch in batches),
            num_microbatches=len(batches),
            sequence_length=batches[0].sequence_length,
            micro_batch_size=self._spec.config.batch.micro_batch_size,
            forward_only=True,
        )
        sums = torch.zeros(4, dtype=torch.float64, device=device)
        if place.is_last_stage and place.tp_rank == 0:  # of each context-parallel rank those of its own tokens
            sums[:2] = torch.stack(reports).sum(dim=0)
        if place.speaks_for_copy:
            sums[2] = sum(batch.num_samples for batch in batches)
            sums[3] = sum(len(batch.skipped) for batch in batches)
        return sums


def as_validated(stage: ResolvedStage) -> ResolvedStage:
    """The stage without VTC and LDS, and with the samples that it is validated on, if it is."""
    config = stage.config.model_copy(update={"vtc": None, "lds": None})
    data = stage.data if stage.held_out is None else stage.held_out.data
    return stage.model_copy(update={"config": config, "data": data})


def forward(batch: Batch, unit: torch.nn.Module) -> ForwardResult:
    """One micro-batch through one unit of the schedule, and what the last one makes of its losses."""
    trail.enter("validation", batch.number)
    mask = own_tokens(batch.loss_mask, 1, batch.packing)
    return unit(batch, batch.labels), partial(loss_sums, loss_mask=mask)


def loss_sums(token_losses: torch.Tensor, loss_mask: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
    """``token_losses`` and ``loss_mask`` [b, s] -> float64 [2]: their sum where the mask is 1, and how many these are.
    ``non_loss_data`` is how megatron-core asks for it."""
    counts = loss_mask.double()
    return torch.stack([(token_losses.double() * counts).sum(), counts.sum()])
