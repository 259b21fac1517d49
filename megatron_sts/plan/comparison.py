"""What LDS gains under a pipeline, by sampler, each with its best layout: for ``megatron-sts plan``."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.resolve import Layout, Resolved, ResolvedStage, with_layout
from megatron_sts.lds.effective import effective_probabilities, largest_change
from megatron_sts.lds.placement import placement
from megatron_sts.plan.layout import StepTime, choose_layout, expected_total, grid, layer_flops, near_even, run_time
from megatron_sts.plan.schedule import schedule_time

SAMPLERS = ("bernoulli", "balanced", "quota")
LAYOUT_AWARE = ("balanced", "quota")


@dataclass(frozen=True)
class Planned:
    """One sampler with the layout planned for it."""

    layout: Layout
    speedup: float
    """Over the dense run with its own best layout."""
    efficiency: float
    """Share of the ideal saving, (1 - 1/speedup) / (1 - 1/ideal)."""
    largest_change: float
    """max |p'_l - p_l| over the steps of the grid: what ``quota`` pays."""


@dataclass(frozen=True)
class Comparison:
    """Speed-ups of a run's LDS, all over the dense run with its best layout."""

    dense_layout: Layout
    ideal_speedup: float
    """If what is executed were spread evenly over the ranks, which wait as they do in the dense run."""
    flops_speedup: float
    """FLOPs of the dense run over those executed: what is gained if the ranks' shares are as uneven as in the dense run."""
    naive_speedup: float
    """``bernoulli`` on contiguous stages, one chunk a rank, as even as may be."""
    configured_speedup: float
    """The config's own sampler and layout."""
    samplers: dict[str, Planned]
    sampler: str
    """Whose plan counts: the config's, or where that is ``bernoulli`` the faster of the two that follow the layout."""

    @property
    def planned(self) -> Planned:
        """The plan that counts."""
        return self.samplers[self.sampler]


def compare(resolved: Resolved, step_time: StepTime = schedule_time) -> Comparison | None:
    """None for a run that skips nothing, or always the same layers."""
    drawn = [stage.config.lds for stage in resolved.stages if stage.config.lds is not None]
    own = next((lds.sampler for lds in drawn if lds.sampler in SAMPLERS), None)
    if own is None:
        return None
    resolved = _with_chunks_free(resolved)
    dense = with_sampler(resolved, None)
    dense_layout = choose_layout(dense, step_time)
    dense_time = run_time(dense, dense_layout, step_time)
    ideal = dense_time / _spread_time(resolved, dense_layout, step_time)
    samplers = {name: _plan(with_sampler(resolved, name), dense_time, ideal, step_time) for name in SAMPLERS}
    pp, num_layers = resolved.config.parallel.pipeline_model_parallel_size, resolved.config.model.language.num_layers
    naive = run_time(with_sampler(resolved, "bernoulli"), near_even(num_layers, pp, 1), step_time)
    faster = max(LAYOUT_AWARE, key=lambda name: samplers[name].speedup)
    return Comparison(
        dense_layout=dense_layout,
        ideal_speedup=ideal,
        flops_speedup=_flops(dense) / _flops(resolved),
        naive_speedup=dense_time / naive,
        configured_speedup=dense_time / run_time(resolved, resolved.layers_per_chunk, step_time),
        samplers=samplers,
        sampler=faster if own == "bernoulli" else own,
    )


def with_sampler(resolved: Resolved, sampler: str | None) -> Resolved:
    """The same run with another sampler in all stages that draw layers; None: dense, fixed layers included."""

    def changed(stage: ResolvedStage) -> ResolvedStage:
        lds = stage.config.lds
        if lds is None or (sampler is not None and lds.sampler not in SAMPLERS):
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


def _with_chunks_free(resolved: Resolved) -> Resolved:
    """Lets the plans below choose the number of chunks, whatever the config has."""
    parallel = resolved.config.parallel.model_copy(update={"virtual_pipeline_model_parallel_size": None})
    return resolved.model_copy(update={"config": resolved.config.model_copy(update={"parallel": parallel})})


def _plan(resolved: Resolved, dense_time: float, ideal: float, step_time: StepTime) -> Planned:
    layout = choose_layout(resolved, step_time)
    speedup = dense_time / run_time(resolved, layout, step_time)
    laid_out = with_layout(resolved, layout)
    # The first step skips most in every decaying schedule; a grid has only the middles of its parts.
    changes = [
        largest_change(stage.config.lds, [0, *grid(stage.num_steps)], stage.num_steps, placement(laid_out, stage))
        for stage in resolved.stages
        if stage.config.lds is not None
    ]
    return Planned(layout, speedup, (1 - 1 / speedup) / (1 - 1 / ideal) if ideal > 1 else 1.0, max(changes))


def _flops(resolved: Resolved) -> float:
    return sum(
        expected_total(resolved, stage) * stage.num_steps * layer_flops(resolved, stage) for stage in resolved.stages
    )


def _spread_time(resolved: Resolved, layout: Layout, step_time: StepTime) -> float:
    """Time of the run if each chunk of ``layout`` had the same share of what a step executes."""
    pp, vpp = len(layout[0]), len(layout)
    time = 0.0
    for stage in resolved.stages:
        total = expected_total(resolved, stage)
        even = np.full((1, 1, vpp, pp), total / (vpp * pp))
        of_step = float(step_time(even, stage.num_microbatches)[0]) / stage.num_microbatches
        time += of_step * stage.num_steps * layer_flops(resolved, stage)
    return time
