"""What the stages of a run take, with all that they skip and compress, in seconds, rates and GPU-hours. Torch-free.

A stage is stood for by the steps of a grid (``plan.steps.grid``): the shape that VTC gives each, the masks that LDS draws.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.tokens import TokenCounts
from megatron_sts.cost.flops import Causal, planned_load, step_flops
from megatron_sts.lds.placement import placement
from megatron_sts.plan.hardware import Hardware
from megatron_sts.plan.layout import LEAST_DRAWN, expected_totals
from megatron_sts.plan.savings import savings
from megatron_sts.plan.steps import Steps, drawn_steps, grid, num_active, scheduled_work
from megatron_sts.plan.timeline import idle_share, step_seconds
from megatron_sts.plan.timing.step import deferred_s, durations, launch_ratio, lead_s, pieces_of, spent, windows
from megatron_sts.plan.timing.update import Share, Update, update
from megatron_sts.plan.timing.workload import ASSUMED, Assumptions, Workload, workload_of

SECONDS_AN_HOUR = 3600


@dataclass(frozen=True)
class StageTime:
    """One stage, in the mean over its steps."""

    name: str
    num_steps: int
    num_gpus: int
    step_time_s: float
    pipeline_s: float
    update: Update
    bubble: float
    """Share of the pipeline's time that its ranks wait."""
    launch_ratio: float
    """Of the rank where it is largest, dense: above 1 its host launches more slowly than its GPU computes."""
    spent: dict[str, float]
    """Seconds a step of a rank's GPU by kind, in the mean over ranks."""
    tokens: float
    """Of a step, over all ranks, padding included."""
    images: float
    flops: dict[Causal, float]
    """Of a step, executed, by how much of causal attention's score matrix counts."""
    peak_tflops: float
    uncertainty: float
    """Relative, of the seconds."""

    @property
    def hours(self) -> float:
        """Of the stage."""
        return self.num_steps * self.step_time_s / SECONDS_AN_HOUR

    def tflops(self, causal: Causal) -> float:
        """A GPU."""
        return self.flops[causal] / self.step_time_s / self.num_gpus / 1e12

    @property
    def mfu(self) -> float:
        """Of the data sheet's peak; causal attention half counted."""
        return self.tflops("half") / self.peak_tflops


def stage_time(
    hardware: Hardware, resolved: Resolved, stage: ResolvedStage, assumptions: Assumptions = ASSUMED
) -> StageTime:
    """One stage on given hardware."""
    steps = grid(stage.num_steps)
    all_totals = expected_totals(resolved, stage)
    by_shape: dict[TokenCounts, list[int]] = defaultdict(list)
    for place, step in enumerate(steps):
        by_shape[stage.tokens(step)].append(place)
    parts = [
        _some_steps(
            hardware, resolved, stage, assumptions, counts, [steps[place] for place in places], all_totals[places]
        )
        for counts, places in by_shape.items()
    ]
    shares = np.array([len(places) for places in by_shape.values()]) / len(steps)

    def mean(values: list[float]) -> float:
        return float(shares @ np.array(values))

    ratio = mean([part.launch_ratio for part in parts])
    is_fp8 = any(workload_of(resolved, stage, counts).fp8_products for counts in by_shape)
    peak = getattr(hardware.device.peak_tflops, "fp8" if is_fp8 else "bf16")
    return StageTime(
        name=stage.name,
        num_steps=stage.num_steps,
        num_gpus=resolved.world_size,
        step_time_s=mean([part.pipeline_s + part.update.total_s for part in parts]),
        pipeline_s=mean([part.pipeline_s for part in parts]),
        update=Update(
            *(mean([getattr(part.update, name) for part in parts]) for name in ("reduce_s", "gather_s", "optimizer_s"))
        ),
        bubble=mean([part.bubble for part in parts]),
        launch_ratio=ratio,
        spent={kind: mean([part.spent[kind] for part in parts]) for kind in parts[0].spent},
        tokens=mean([part.tokens for part in parts]),
        images=mean([part.images for part in parts]),
        flops={causal: mean([part.flops[causal] for part in parts]) for causal in ("half", "full")},
        peak_tflops=peak or hardware.device.peak_tflops.bf16,
        uncertainty=hardware.uncertainty if ratio <= 1 else hardware.host.uncertainty,
    )


@dataclass(frozen=True)
class _Part:
    """Steps of one shape, in the mean."""

    pipeline_s: float
    update: Update
    bubble: float
    launch_ratio: float
    spent: dict[str, float]
    tokens: float
    images: float
    flops: dict[Causal, float]


def _some_steps(
    hardware: Hardware, resolved: Resolved, stage: ResolvedStage, assumptions: Assumptions, counts: TokenCounts,
    steps: list[int], totals: NDArray[np.float64],
) -> _Part:  # fmt: skip
    """``totals``: expected work of each step, in layers."""
    workload, place = workload_of(resolved, stage, counts, assumptions), placement(resolved, stage)
    drawn = drawn_steps(resolved.config.seed, stage, place, resolved.layers_per_chunk, steps)
    pieces, num_layers = pieces_of(hardware, workload), resolved.config.model.language.num_layers
    every_layer = np.array(workload.layout, dtype=np.float64)[None]
    dense = durations(hardware, workload, pieces, every_layer)
    dense_s, dense_idle = (
        float(step_seconds(dense, workload.num_microbatches)),
        float(idle_share(dense, workload.num_microbatches)),
    )
    layers = float(totals.mean()) - sum(place.fixed_work)
    seconds, idle = _drawn_times(hardware, workload, drawn)
    skipped = num_layers - float((drawn.totals - drawn.first - drawn.last).mean())
    # As in plan.layout: how many layers the grid's masks happen to skip cancels, how they lie on the ranks remains.
    ratio = (num_layers - layers) / skipped if skipped > LEAST_DRAWN else 0.0
    load = planned_load(resolved, stage, counts)
    late_s = deferred_s(hardware, workload, dense) + lead_s(pieces)
    return _Part(
        pipeline_s=dense_s - (dense_s - seconds) * ratio + late_s,
        update=update(hardware, workload, windows(dense), _share(resolved, stage)),
        bubble=idle if skipped > LEAST_DRAWN else dense_idle,
        launch_ratio=float(launch_ratio(pieces, every_layer).max()),
        spent=spent(workload, pieces, layers),
        tokens=load.num_tokens,
        images=load.num_images,
        flops={
            causal: float(step_flops(resolved, stage, load, layers_executed=layers, causal=causal))
            for causal in ("half", "full")
        },
    )


def _drawn_times(hardware: Hardware, workload: Workload, drawn: Steps) -> tuple[float, float]:
    """Seconds of the pipeline and share that ranks wait, in the mean over the drawn steps."""
    pieces, counts = pieces_of(hardware, workload), num_active(drawn.work)
    seconds, idle = np.empty(len(drawn.work)), np.empty(len(drawn.work))
    for count in np.unique(counts):
        these = counts == count
        run = durations(hardware, workload, pieces, scheduled_work(drawn.work[these], 0.0, 0.0))
        seconds[these] = step_seconds(run, workload.num_microbatches)
        idle[these] = idle_share(run, workload.num_microbatches)
    return float((drawn.weights @ seconds).mean()), float((drawn.weights @ idle).mean())


def _share(resolved: Resolved, stage: ResolvedStage) -> Share:
    """Of reductions, gathers and updates, what idle layers leave."""
    lds = stage.config.lds
    if lds is None or not any(part not in stage.config.freeze for part in resolved.config.model.parts):
        return Share()
    saved = savings(resolved, stage, lds)
    return Share(1 - (saved.reduced or 0.0), 1 - (saved.gathered or 0.0), 1 - saved.updated)
