"""What LDS gains under a pipeline, by sampler, each with its best layout: for ``megatron-sts plan``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.resolve import Layout, Resolved, ResolvedStage, can_interleave, with_layout
from megatron_sts.lds.effective import effective_probabilities, largest_change
from megatron_sts.lds.placement import placement
from megatron_sts.plan.candidates import near_even
from megatron_sts.plan.layout import NEAR_BEST, choose_layout, expected_total, run_time, stage_times
from megatron_sts.plan.schedule import schedule_time
from megatron_sts.plan.steps import StepTime, grid, layer_flops

SAMPLERS = ("bernoulli", "balanced", "quota", "rounds")


@dataclass(frozen=True)
class Planned:
    """One sampler with the layout planned for it."""

    layout: Layout
    speedup: float
    """Of the whole run, over the dense run with its own best layout."""
    stage_speedup: float
    """Of the stages that skip alone."""
    efficiency: float
    """Saved time over saved FLOPs of these stages, (1 - t/t_dense) / (1 - executed FLOPs / dense FLOPs)."""
    bound: float
    """m v/(m v + pp - 1) for their m micro-batches and v chunks a rank: what ``rounds`` reaches if all chunks are equal and there
    is neither head nor tower. Of several such stages the least."""
    largest_change_at_start: float
    """max |p'_l - p_l| in the first step."""
    largest_change: float
    """max |p'_l - p_l| over the steps of the grid and the first: what ``quota`` and ``rounds`` pay."""


@dataclass(frozen=True)
class Comparison:
    """Speed-ups of a run's LDS, all over the dense run with its best layout."""

    dense_layout: Layout
    flops_speedup: float
    """Ideal of the whole run: FLOPs of the dense run over those executed."""
    stage_flops_speedup: float
    """Ideal of the stages that skip."""
    naive_speedup: float
    """``bernoulli`` on contiguous stages, one chunk a rank, as even as may be."""
    configured_speedup: float
    """The config's own sampler and layout."""
    samplers: dict[str, Planned]
    """Without ``rounds`` where the run cannot interleave or all its stages draw a mask for each micro-batch."""
    sampler: str
    """The config's, whose plan counts: with it ``parallel.layout: auto`` runs."""

    @property
    def planned(self) -> Planned:
        """The plan that counts."""
        return self.samplers[self.sampler]

    @property
    def fastest(self) -> str:
        """The sampler with the fastest plan; the config's own if that is as fast, but for what a search leaves open."""
        best = max(self.samplers, key=lambda name: self.samplers[name].speedup)
        return self.sampler if self.planned.speedup >= self.samplers[best].speedup * (1 - NEAR_BEST) else best


def compare(resolved: Resolved, step_time: StepTime = schedule_time) -> Comparison | None:
    """None for a run that skips nothing, or always the same layers."""
    drawn = [stage.config.lds for stage in resolved.stages if stage.config.lds is not None]
    own = next((lds.sampler for lds in drawn if lds.sampler in SAMPLERS), None)
    if own is None:
        return None
    configured, resolved = resolved, with_chunks_free(resolved)
    dense = with_sampler(resolved, None)
    dense_layout = choose_layout(dense, step_time)
    samplers = {
        name: plan_with(with_sampler(resolved, name), dense_layout, step_time)
        for name in SAMPLERS
        if name != "rounds" or own == "rounds" or _may_drop_rounds(resolved)
    }
    pp, num_layers = resolved.config.parallel.pipeline_model_parallel_size, resolved.config.model.language.num_layers
    dense_time = run_time(dense, dense_layout, step_time)
    naive = run_time(with_sampler(resolved, "bernoulli"), near_even(num_layers, pp, 1), step_time)
    return Comparison(
        dense_layout=dense_layout,
        flops_speedup=_flops(dense) / _flops(resolved),
        stage_flops_speedup=_flops(dense, _skipping(resolved)) / _flops(resolved, _skipping(resolved)),
        naive_speedup=dense_time / naive,
        configured_speedup=dense_time / run_time(configured, configured.layers_per_chunk, step_time),
        samplers=samplers,
        sampler=own,
    )


def with_sampler(resolved: Resolved, sampler: str | None) -> Resolved:
    """The same run with another sampler in all stages that draw layers; None: dense, fixed layers included.

    ``rounds`` draws no mask for each micro-batch: stages that ask for those keep their sampler.
    """

    def changed(stage: ResolvedStage) -> ResolvedStage:
        lds = stage.config.lds
        if lds is None or (sampler is not None and lds.sampler not in SAMPLERS):
            return stage
        if sampler == "rounds" and lds.granularity == "microbatch":
            return stage
        new = None if sampler is None else lds.model_copy(update={"sampler": sampler})
        return stage.model_copy(update={"config": stage.config.model_copy(update={"lds": new})})

    return resolved.model_copy(update={"stages": tuple(map(changed, resolved.stages))})


def rank_work(resolved: Resolved, stage: ResolvedStage, step: int) -> NDArray[np.float64]:
    """What each pipeline rank expects to compute in a step, in layers, [pp]."""
    place, lds = placement(resolved, stage), stage.config.lds
    keep = np.ones(place.num_layers)
    if lds is not None:
        keep = 1 - effective_probabilities(lds, step, stage.num_steps, place)
    return np.bincount(place.owner, weights=keep, minlength=place.num_ranks) + np.array(place.fixed_work)


def with_chunks_free(resolved: Resolved) -> Resolved:
    """Lets the plans below choose the number of chunks, whatever the config has."""
    parallel = resolved.config.parallel.model_copy(update={"virtual_pipeline_model_parallel_size": None})
    return resolved.model_copy(update={"config": resolved.config.model_copy(update={"parallel": parallel})})


def plan_with(resolved: Resolved, dense_layout: Layout, step_time: StepTime = schedule_time) -> Planned:
    """The best layout for the run's samplers, and what they gain with it over the dense run in ``dense_layout``."""
    layout = choose_layout(resolved, step_time)
    dense, laid_out = with_sampler(resolved, None), with_layout(resolved, layout)
    skipping = _skipping(resolved)
    dense_of_stages = sum(_stage_time(dense, number, dense_layout, step_time) for number in skipping)
    of_stages = sum(_stage_time(resolved, number, layout, step_time) for number in skipping)
    executed = _flops(laid_out, skipping) / _flops(dense, skipping)
    return Planned(
        layout=layout,
        speedup=run_time(dense, dense_layout, step_time) / run_time(resolved, layout, step_time),
        stage_speedup=dense_of_stages / of_stages,
        efficiency=(1 - of_stages / dense_of_stages) / (1 - executed) if executed < 1 else 1.0,
        bound=min(_bound(laid_out.stages[number].num_microbatches, layout) for number in skipping),
        largest_change_at_start=_largest_change(laid_out, lambda stage: [0]),
        # The first step skips most in every decaying schedule; a grid has only the middles of its parts.
        largest_change=_largest_change(laid_out, lambda stage: [0, *grid(stage.num_steps)]),
    )


def _may_drop_rounds(resolved: Resolved) -> bool:
    drawn = [stage.config.lds for stage in resolved.stages if stage.config.lds is not None]
    return can_interleave(resolved) and any(lds.granularity == "step" and lds.sampler in SAMPLERS for lds in drawn)


def _bound(num_microbatches: int, layout: Layout) -> float:
    chunks = num_microbatches * len(layout)
    return chunks / (chunks + len(layout[0]) - 1)


def _skipping(resolved: Resolved) -> list[int]:
    return [stage.index for stage in resolved.stages if stage.config.lds is not None]


def _largest_change(resolved: Resolved, steps: Callable[[ResolvedStage], list[int]]) -> float:
    return max(
        largest_change(stage.config.lds, steps(stage), stage.num_steps, placement(resolved, stage))
        for stage in resolved.stages
        if stage.config.lds is not None
    )


def _stage_time(resolved: Resolved, number: int, layout: Layout, step_time: StepTime) -> float:
    return float(stage_times(resolved, resolved.stages[number], [layout], step_time)[0])


def _flops(resolved: Resolved, numbers: list[int] | None = None) -> float:
    """Executed FLOPs of the run, or of these stages."""
    stages = resolved.stages if numbers is None else [resolved.stages[number] for number in numbers]
    return sum(expected_total(resolved, stage) * stage.num_steps * layer_flops(resolved, stage) for stage in stages)
