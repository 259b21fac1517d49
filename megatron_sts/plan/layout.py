"""Chooses the pipeline layout with which a run takes least time, LDS and all its stages counted.

What a layout costs is simulated: on a grid of steps of each stage the sampler that will be used draws its masks, and
each step takes what megatron-core's schedule takes with the rounds and chunks that are left (``plan.steps``). Work is
FLOPs of matrix products: neither memory, nor transfers, nor the efficiency of small products enter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.config.resolve import Layout, Resolved, ResolvedStage, can_interleave, with_layout
from megatron_sts.config.sparsity_checks import check_rounds
from megatron_sts.lds.effective import effective_probabilities
from megatron_sts.lds.placement import placement
from megatron_sts.plan.candidates import moves, near_even, shapes
from megatron_sts.plan.expected import ExpectedWork, expected_work
from megatron_sts.plan.rough import RoughTimes
from megatron_sts.plan.schedule import schedule_time
from megatron_sts.plan.steps import StepTime, dense_step, drawn_steps, grid, layer_flops, step_times

LEAST_GAIN = 1e-4
"""A layer is moved for this relative gain."""
NEAR_BEST = 0.001
"""Fewer chunks a rank are preferred at this relative loss: each one more means more transfers and more buckets."""
ROUGHLY_BEST = 0.02
"""Layouts whose rough time is within this of the least are timed with the masks that they will have."""
LEAST_DRAWN = 1e-9
"""Layers a step: less is rounding, and the masks of the grid skip nothing."""
MOST_TIMED = 8
MOST_MOVES = 4
SEARCHED_NUMBERS = 2
"""Numbers of chunks a rank for which layers are moved, the best ones."""


def choose_layout(resolved: Resolved, step_time: StepTime = schedule_time) -> Layout:
    """The layout for ``parallel.layout: auto``: among all numbers of chunks, or for the one that is written.

    A pure function of the run. The fewest chunks a rank within ``NEAR_BEST`` of the least time. Refuses a run that skips
    by the rounds of its layout and cannot interleave.
    """
    finalists = _finalists(resolved, step_time)
    timed = list(zip(run_times(resolved, finalists, step_time).tolist(), finalists, strict=True))
    limit = min(time for time, _ in timed) * (1 + NEAR_BEST)
    fewest = min(len(layout) for time, layout in timed if time <= limit)
    return min((time, layout) for time, layout in timed if len(layout) == fewest)[1]


def run_times(
    resolved: Resolved, layouts: Sequence[Layout], step_time: StepTime = schedule_time
) -> NDArray[np.float64]:
    """Time of all stages with each layout, [layouts], in FLOPs that a pipeline rank computes meanwhile (those of all its
    copies)."""
    return sum((stage_times(resolved, stage, layouts, step_time) for stage in resolved.stages), np.zeros(len(layouts)))


def run_time(resolved: Resolved, layout: Layout, step_time: StepTime = schedule_time) -> float:
    """``run_times`` of one layout."""
    return float(run_times(resolved, [layout], step_time)[0])


def stage_times(
    resolved: Resolved, stage: ResolvedStage, layouts: Sequence[Layout], step_time: StepTime = schedule_time
) -> NDArray[np.float64]:
    """Time of one stage, as ``run_times``."""
    place, seed = placement(resolved, stage), resolved.config.seed
    steps = [drawn_steps(seed, stage, place, layout, grid(stage.num_steps)) for layout in layouts]
    dense = [dense_step(place, layout) for layout in layouts]
    times, dense_times = (
        np.array([each.mean() for each in step_times(part, stage.num_microbatches, step_time)])
        for part in (steps, dense)
    )
    # A ratio estimate of the time that a skipped layer saves: how many the masks of the grid happen to skip cancels, how
    # they lie on the ranks remains.
    dense_totals = np.array([each.totals[0] for each in dense])
    drawn = dense_totals - [each.totals.mean() for each in steps]
    expected = dense_totals - [expected_total(with_layout(resolved, layout), stage) for layout in layouts]
    skips = drawn > LEAST_DRAWN
    times = dense_times - np.where(skips, (dense_times - times) * expected / np.where(skips, drawn, 1), 0)
    return times * stage.num_steps * layer_flops(resolved, stage)


def expected_total(resolved: Resolved, stage: ResolvedStage) -> float:
    """Work of all ranks in a step, in layers, in the mean over the grid."""
    return float(expected_totals(resolved, stage).mean())


def expected_totals(resolved: Resolved, stage: ResolvedStage) -> NDArray[np.float64]:
    """Work of all ranks in each step of the grid, in layers."""
    place, lds, steps = placement(resolved, stage), stage.config.lds, grid(stage.num_steps)
    dense = np.full(len(steps), place.num_layers + sum(place.fixed_work))
    if lds is None:
        return dense
    return dense - [effective_probabilities(lds, step, stage.num_steps, place).sum() for step in steps]


def _finalists(resolved: Resolved, step_time: StepTime) -> list[Layout]:
    """The layouts that are roughly the best, of each number of chunks at most one that was searched for."""
    parallel, num_layers = resolved.config.parallel, resolved.config.model.language.num_layers
    pp, written = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    numbers = _numbers_of_chunks(resolved) if written is None else [written]
    expected = [expected_work(resolved, stage, grid(stage.num_steps)) for stage in resolved.stages]
    rough = RoughTimes(resolved, step_time)
    layouts = [layout for vpp in numbers for layout in shapes(num_layers, pp, vpp)]
    layouts += [_evened_out(near_even(num_layers, pp, vpp), expected) for vpp in numbers]
    layouts = [layout for layout in layouts if _has_rounds(resolved, layout)] or layouts
    times = dict(zip(layouts, rough(layouts).tolist(), strict=True))
    for _ in range(MOST_MOVES):
        best = _best_of_each_number(times)[:SEARCHED_NUMBERS]
        moved = [each for layout in best for each in moves(layout) if each not in times and _has_rounds(resolved, each)]
        before = min(times.values())
        times |= zip(moved, rough(moved).tolist(), strict=True) if moved else []
        if min(times.values()) > before * (1 - LEAST_GAIN):
            break
    limit = min(times.values()) * (1 + ROUGHLY_BEST)
    return [layout for layout in _best_of_each_number(times) if times[layout] <= limit][:MOST_TIMED]


def _has_rounds(resolved: Resolved, layout: Layout) -> bool:
    """Whether all stages could run in this layout: those that skip its rounds have some that may be skipped."""
    try:
        for stage in resolved.stages:
            check_rounds(stage.config, layout)
    except ConfigError:
        return False
    return True


def _best_of_each_number(times: dict[Layout, float]) -> list[Layout]:
    """The fastest layout of each number of chunks, the fastest first."""
    best: dict[int, Layout] = {}
    for layout in sorted(times, key=lambda layout: (times[layout], layout)):
        best.setdefault(len(layout), layout)
    return list(best.values())


def _numbers_of_chunks(resolved: Resolved) -> list[int]:
    """Chunks a rank that the run can have; one more than full slots would need, so that some may stay empty."""
    parallel, num_layers = resolved.config.parallel, resolved.config.model.language.num_layers
    pp = parallel.pipeline_model_parallel_size
    least = 1
    for stage in resolved.stages:
        lds = stage.config.lds
        if lds is not None and lds.sampler == "rounds" and lds.rounds == "layout":
            least = 2
            if not can_interleave(resolved):
                refuse(f"stages.{stage.name}.lds.rounds", "layout", "the run cannot interleave, so that a rank has one chunk and "
                       "there is nothing to drop", "set sampler=balanced, rounds to a number of blocks, or more than one pipeline "
                       "rank with micro-batches in multiples of them")  # fmt: skip
    most = -(-num_layers // pp) + (pp > 1) if can_interleave(resolved) else 1
    return list(range(least, most + 1))


def _evened_out(layout: Layout, expected: list[ExpectedWork]) -> Layout:
    """Moves layers one by one between the ranks' chunks of one round, as long as the expected time falls."""
    counts, (vpp, pp) = np.array(layout).ravel(), np.array(layout).shape
    cost = np.inf
    while True:
        moves = np.concatenate([counts[None], _moves(counts, vpp, pp)])
        costs = sum((each.cost(moves, pp) for each in expected), np.zeros(len(moves)))
        best = int(np.argmin(costs))
        if costs[best] >= cost * (1 - LEAST_GAIN):
            return tuple(tuple(row) for row in counts.reshape(vpp, pp).tolist())
        counts, cost = moves[best], costs[best]


def _moves(counts: NDArray[np.int_], vpp: int, pp: int) -> NDArray[np.int_]:
    """One layer from any chunk that has one to another rank's of the same round, [moves, chunks]."""
    rank, chunks = np.eye(pp, dtype=np.int_), np.eye(vpp, dtype=np.int_)
    between = (rank[None] - rank[:, None])[~np.eye(pp, dtype=np.bool_)]
    moved = counts + np.einsum("vw,mp->vmwp", chunks, between).reshape(-1, vpp * pp)
    return np.asarray(moved[(moved >= 0).all(axis=1)])
