"""One step of a stage, pass by pass, to look at: the middle one, with the mask that it most likely has. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.lds.placement import placement
from megatron_sts.plan.hardware import Hardware
from megatron_sts.plan.steps import drawn_steps, scheduled_work
from megatron_sts.plan.timeline import Event, timeline
from megatron_sts.plan.timing.step import durations, pieces_of, windows
from megatron_sts.plan.timing.update import Update, update
from megatron_sts.plan.timing.workload import ASSUMED, Assumptions, workload_of


@dataclass(frozen=True)
class ExampleStep:
    """A step of one stage."""

    stage: str
    step: int
    num_ranks: int
    """Pipeline ranks."""
    layers: list[list[list[float]]]
    """That run, [rows][round][rank]; one row for all micro-batches or one for each. Rounds that nobody runs are left out."""
    events: list[Event]
    update: Update
    """What follows the passes."""

    @property
    def pipeline_s(self) -> float:
        """When the last pass ends."""
        return max(event.end_s for event in self.events)


def example_step(
    hardware: Hardware, resolved: Resolved, stage: ResolvedStage, assumptions: Assumptions = ASSUMED
) -> ExampleStep:
    """The stage's middle step."""
    step = stage.num_steps // 2
    workload = workload_of(resolved, stage, stage.tokens(step), assumptions)
    drawn = drawn_steps(resolved.config.seed, stage, placement(resolved, stage), resolved.layers_per_chunk, [step])
    likely = int(np.argmax(drawn.weights[0]))
    layers = scheduled_work(drawn.work[likely : likely + 1], 0.0, 0.0)
    run = durations(hardware, workload, pieces_of(hardware, workload), layers)
    events = timeline(run, workload.num_microbatches)
    return ExampleStep(
        stage.name, step, workload.pipeline_parallel_size, layers[0].tolist(), events,
        update(hardware, workload, windows(run)),
    )  # fmt: skip
