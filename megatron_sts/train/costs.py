"""A step's line for metrics.jsonl: what it learnt, what it executed, how long that took and how fast that is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.cost.activations import has_fp8
from megatron_sts.cost.flops import TokenLoad, device_peak_tflops, step_flops
from megatron_sts.report.fields import RATES, SECONDS
from megatron_sts.runtime.clock import KINDS, Kind
from megatron_sts.runtime.device import current_device
from megatron_sts.train.step import StepResult


@dataclass(frozen=True)
class StepTimes:
    """Of one step, over all ranks."""

    step_s: float
    """The slowest rank's."""
    data_wait_s: float
    """The longest that a rank waited for its samples to be read."""
    spent_s: dict[Kind, float]
    """Where the time of the mean rank went."""
    own_s: float
    """The mean rank's step."""
    checkpoint_s: float
    """How long training stood still for checkpoints since the last line."""


class StepCosts:
    """FLOPs of a step from what was executed: layers that ran, images seen, tokens kept. Whole model, all ranks."""

    def __init__(self, resolved: Resolved, stage: ResolvedStage) -> None:
        self._resolved, self._stage = resolved, stage

    def of_copy(self, result: StepResult) -> int:
        """FLOPs of this rank's copy of the model."""
        return self._executed(result, result.own.load)

    def _executed(self, result: StepResult, load: TokenLoad) -> int:
        """FLOPs of a load with the layers that ran."""
        layers_executed = sum(result.layer_runs) / self._stage.num_microbatches
        return step_flops(self._resolved, self._stage, load, layers_executed=layers_executed)

    def _peak_tflops(self, load: TokenLoad) -> float | None:
        """The device's, as configured or known, of the format in which decoder layers multiply for a step's load."""
        config = self._resolved.config
        dtype = "fp8" if self._in_fp8(load) else config.precision.params
        return config.logging.device_peak_tflops or device_peak_tflops(current_device().name, dtype)

    def _in_fp8(self, load: TokenLoad) -> bool:
        """Whether decoder layers multiply in FP8, for a step's load."""
        num_ranks = self._resolved.data_parallel_size * self._resolved.config.parallel.context_parallel_size
        num_tokens = load.num_tokens // (self._stage.num_microbatches * num_ranks)
        return has_fp8(self._resolved, self._stage, num_tokens)

    def _spread(self, result: StepResult, most: float) -> dict[str, float | None]:
        """How much more than the mean the copy with most FLOPs had; before: without ``batch.balance``, where that is on."""
        num_copies, loads = self._resolved.data_parallel_size, result.balanced.loads_before if result.balanced else ()
        before = [self._executed(result, load) for load in loads]
        return {
            "load_spread": most * num_copies / self._executed(result, result.totals.load),
            "load_spread_before": max(before) * num_copies / sum(before) if before else None,
        }

    def describe(self, result: StepResult, times: StepTimes, peak_bytes: int, most: float) -> dict[str, Any]:
        """The step's line. ``most``: the largest ``of_copy``."""
        stage, totals = self._stage, result.totals
        layers_executed = sum(result.layer_runs) / stage.num_microbatches
        executed = self._executed(result, totals.load)
        dense = step_flops(self._resolved, stage, totals.dense_load, layers_executed=len(result.layer_runs))
        return {
            "stage": stage.name,
            "step": result.mask.step,
            "loss": finite_or_none(result.loss),
            "grad_norm": finite_or_none(result.grad_norm),
            "lr": result.lr,
            "updated": result.not_updated is None,
            "not_updated": result.not_updated,
            "samples": totals.num_samples,
            "tokens": totals.num_tokens,
            "padded_tokens": totals.load.num_tokens,
            "loss_tokens": int(totals.num_loss_tokens),
            "images": totals.load.num_images,
            "visual_tokens_in": totals.dense_load.num_visual_tokens,
            "visual_tokens_out": totals.load.num_visual_tokens,
            "samples_skipped": totals.num_skipped_samples,
            "samples_truncated": totals.num_truncated_samples,
            "layers_skipped": whole(len(result.layer_runs) - layers_executed),
            "layer_runs": result.layer_runs,
            "num_microbatches": stage.num_microbatches,
            "skip_digest": result.mask.digest,
            "flops_dense": dense,
            "flops_executed": executed,
            **self._spread(result, most),
            "in_fp8": self._in_fp8(totals.load),
            **_seconds(times),
            **self._throughput(result, executed, dense, times.step_s),
            "peak_memory_bytes": peak_bytes,
        }

    def _throughput(self, result: StepResult, executed: int, dense: int, step_s: float) -> dict[str, float | None]:
        """Global rates, and those of one device. ``dense_``: as if the same samples had been computed without VTC and LDS."""
        totals, device_s = result.totals, step_s * self._resolved.world_size
        visual = totals.load.num_visual_tokens
        tflops, dense_tflops = executed / device_s / 1e12, dense / device_s / 1e12
        peak = self._peak_tflops(totals.load)
        rates = (
            totals.num_tokens / step_s,
            (totals.num_tokens - visual) / step_s,
            visual / step_s,
            totals.load.num_images / step_s,
            totals.num_tokens / device_s,
            tflops,
            dense_tflops,
            tflops / peak if peak else None,
            dense_tflops / peak if peak else None,
        )
        return dict(zip(RATES, rates, strict=True))


def _seconds(times: StepTimes) -> dict[str, float]:
    """``step_time_s`` and ``data_wait_s`` are the largest of any rank; the others are the mean rank's, and come to its step."""
    spent_s = (times.spent_s[kind] for kind in KINDS)
    left_s = other_s(times.spent_s, times.own_s)
    return dict(zip(SECONDS, (times.step_s, times.data_wait_s, *spent_s, left_s, times.checkpoint_s), strict=True))


def other_s(spent_s: Mapping[Kind, float], step_s: float) -> float:
    """What is left of a step. A GPU's clock and the host's, which bounds the step, may differ by microseconds."""
    return max(0.0, step_s - sum(spent_s.values()))


def whole(value: float) -> float:
    """An int where it is one: masks of a whole step skip whole layers, those of micro-batches skip 2.5 in the mean."""
    return int(value) if value.is_integer() else value


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
