"""Chooses the pipeline layout with which a run takes least time, LDS and all its stages counted.

What a layout costs is simulated: on a grid of steps of each stage the sampler that will be used draws its masks, and
each step takes what megatron-core's schedule takes with the chunks that are left (``cost.simulate``). Work is FLOPs of
matrix products: neither memory, nor transfers, nor the efficiency of small products enter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.resolve import Layout, Resolved, ResolvedStage, can_interleave, with_layout
from megatron_sts.cost.flops import planned_load, step_work
from megatron_sts.lds.effective import effective_probabilities
from megatron_sts.lds.mask import draw_mask
from megatron_sts.lds.placement import placement
from megatron_sts.plan.expected import ExpectedWork, expected_work
from megatron_sts.plan.schedule import schedule_time

StepTime = Callable[[NDArray[np.float64], int], NDArray[np.float64]]
"""Time of a step from what its chunks compute for a micro-batch and the number of micro-batches."""

GRID_STEPS = 32
"""Steps of a stage, evenly spaced, that stand for all of them."""
LEAST_GAIN = 1e-4
"""A layer is moved for this relative gain."""
NEAR_BEST = 0.005
"""Fewer chunks a rank are preferred at this relative loss: each one more means more transfers and more buckets."""


def choose_layout(resolved: Resolved, step_time: StepTime = schedule_time) -> Layout:
    """The layout for ``parallel.layout: auto``: among all numbers of chunks, or for the one that is written.

    A pure function of the run. The fewest chunks a rank within ``NEAR_BEST`` of the least time.
    """
    timed = [(run_time(resolved, layout, step_time), layout) for layout in _candidates(resolved)]
    limit = min(time for time, _ in timed) * (1 + NEAR_BEST)
    fewest = min(len(layout) for time, layout in timed if time <= limit)
    return min((time, layout) for time, layout in timed if len(layout) == fewest)[1]


def run_time(resolved: Resolved, layout: Layout, step_time: StepTime = schedule_time) -> float:
    """Time of all stages with this layout, in FLOPs that a pipeline rank computes meanwhile (those of all its copies)."""
    resolved = with_layout(resolved, layout)
    return sum(_stage_time(resolved, stage, step_time) for stage in resolved.stages)


def layer_flops(resolved: Resolved, stage: ResolvedStage) -> int:
    """Training FLOPs of one decoder layer in one step of the stage: the unit of its placement's work."""
    return step_work(resolved, stage, planned_load(resolved, stage, stage.typical)).layer


def grid(num_steps: int) -> list[int]:
    """``GRID_STEPS`` steps from the middles of equal parts of the stage, or all of them."""
    count = min(num_steps, GRID_STEPS)
    return [(2 * part + 1) * num_steps // (2 * count) for part in range(count)]


def _stage_time(resolved: Resolved, stage: ResolvedStage, step_time: StepTime) -> float:
    work = _drawn_work(resolved, stage)
    times = step_time(work, stage.num_microbatches) / stage.num_microbatches
    # A ratio estimate: how many layers the masks of the grid happen to skip cancels, how they lie on the ranks remains.
    drawn = work.mean(axis=1).sum(axis=(1, 2)).mean()
    return (
        float(times.mean() / drawn * expected_total(resolved, stage)) * stage.num_steps * layer_flops(resolved, stage)
    )


def expected_total(resolved: Resolved, stage: ResolvedStage) -> float:
    """Work of all ranks in a step, in layers, in the mean over the grid."""
    place, lds = placement(resolved, stage), stage.config.lds
    if lds is None:
        return place.num_layers + sum(place.fixed_work)
    skipped = [effective_probabilities(lds, step, stage.num_steps, place).sum() for step in grid(stage.num_steps)]
    return float(place.num_layers + sum(place.fixed_work) - np.mean(skipped))


def _drawn_work(resolved: Resolved, stage: ResolvedStage) -> NDArray[np.float64]:
    """What each chunk computes for a micro-batch, in layers, [steps of the grid, rows, vpp, pp]."""
    place, lds, layout = placement(resolved, stage), stage.config.lds, np.array(resolved.layers_per_chunk)
    if lds is None:
        runs = np.ones((1, 1, place.num_layers))
    else:
        masks = [
            draw_mask(lds, resolved.config.seed, stage.index, step, stage.num_steps, place, stage.num_microbatches)
            for step in grid(stage.num_steps)
        ]
        runs = 1.0 - np.array([mask.rows for mask in masks])
    ends = np.cumsum(layout)
    sums = np.pad(np.cumsum(runs, axis=-1), [(0, 0), (0, 0), (1, 0)])
    work = (sums[..., ends] - sums[..., ends - layout.ravel()]).reshape(*runs.shape[:2], *layout.shape)
    work[..., 0, :] += [place.fixed_work[0], *[0.0] * (layout.shape[1] - 1)]
    if layout.shape[1] > 1:
        work[..., -1, -1] += place.fixed_work[-1]
    return work


def _candidates(resolved: Resolved) -> Iterator[Layout]:
    """For each number of chunks: as even as may be, and evened out by expected work."""
    parallel, num_layers = resolved.config.parallel, resolved.config.model.language.num_layers
    pp, written = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    most = max(num_layers // pp, 1) if can_interleave(resolved) else 1
    expected = [expected_work(resolved, stage, grid(stage.num_steps)) for stage in resolved.stages]
    for vpp in range(1, most + 1) if written is None else (written,):
        even = near_even(num_layers, pp, vpp)
        yield even
        if (searched := _search(even, expected)) != even:
            yield searched


def near_even(num_layers: int, pp: int, vpp: int) -> Layout:
    """Chunks that differ by one layer at most."""
    ends = [num_layers * number // (pp * vpp) for number in range(pp * vpp + 1)]
    counts = [end - start for start, end in pairwise(ends)]
    return tuple(tuple(counts[chunk * pp : (chunk + 1) * pp]) for chunk in range(vpp))


def _search(layout: Layout, expected: list[ExpectedWork]) -> Layout:
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
