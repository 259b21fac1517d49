"""A whole run in seconds and GPU-hours, beside the same run with nothing skipped or compressed. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sts.config.errors import refuse
from megatron_sts.config.resolve import Layout, Resolved, with_layout
from megatron_sts.plan.comparison import with_sampler
from megatron_sts.plan.hardware import Hardware, check_formats
from megatron_sts.plan.timing.prediction import StageTime, stage_time
from megatron_sts.plan.timing.products import chosen_anew
from megatron_sts.plan.timing.workload import ASSUMED, Assumptions


@dataclass(frozen=True)
class RunTime:
    """All stages of a run, as it is and dense."""

    stages: tuple[StageTime, ...]
    dense: tuple[StageTime, ...]
    dense_layout: Layout
    num_gpus: int

    @property
    def hours(self) -> float:
        """Of the run, steps alone: without starting, evaluating and checkpoints."""
        return sum(stage.hours for stage in self.stages)

    @property
    def uncertainty(self) -> float:
        """Relative, of ``hours``: that of the stages, weighed by their hours."""
        return sum(stage.uncertainty * stage.hours for stage in self.stages) / self.hours

    @property
    def dense_hours(self) -> float:
        """As ``hours``."""
        return sum(stage.hours for stage in self.dense)


def run_time(
    hardware: Hardware, resolved: Resolved, assumptions: Assumptions = ASSUMED, dense_layouts: Sequence[Layout] = ()
) -> RunTime:
    """Times of a run; dense in its own layout or the one of ``dense_layouts`` in which that is fastest.

    Raises:
        ConfigError: the run computes in a format of which the hardware has no rates.
    """
    check_rates(hardware, resolved)
    without = dense(resolved)
    timed = {
        layout: tuple(
            stage_time(hardware, with_layout(without, layout), stage, assumptions) for stage in without.stages
        )
        for layout in dict.fromkeys((resolved.layers_per_chunk, *dense_layouts))
    }
    best = min(timed, key=lambda layout: sum(stage.hours for stage in timed[layout]))
    stages = tuple(stage_time(hardware, resolved, stage, assumptions) for stage in resolved.stages)
    return RunTime(stages, timed[best], best, resolved.world_size)


def check_rates(hardware: Hardware, resolved: Resolved) -> None:
    """Refuses formats that the hardware does not have, or of which no rates are known."""
    precision = resolved.config.precision
    if precision.params == "fp32":
        refuse("precision.params", "fp32", "no rates of fp32 are known", "use bf16, or plan without --hardware")
    if precision.fp8 == "emulate":
        refuse(
            "precision.fp8", "emulate", "how long emulation takes is not modelled", "name a recipe of real FP8, or off"
        )
    check_formats(hardware, precision)


def dense(resolved: Resolved) -> Resolved:
    """The same run without LDS and VTC; ``precision.fp8_where: auto`` decides for its tokens."""
    plain = with_sampler(resolved, None)
    stages = tuple(
        stage.model_copy(update={"config": stage.config.model_copy(update={"lds": None, "vtc": None})})
        for stage in plain.stages
    )
    return chosen_anew(plain.model_copy(update={"stages": stages}))
