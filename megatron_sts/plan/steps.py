"""What the steps of a stage take under a layout: the schedule of a step is made of the rounds that run in it.

A round is chunk v of every pipeline rank. One that no rank and no micro-batch runs a layer of is not in the schedule,
whatever sampler drew the mask. What the first rank computes besides layers then belongs to the first round that is left,
the head to the last one; if none is left they are one unit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.resolve import Layout, Resolved, ResolvedStage
from megatron_sts.config.schema import LdsConfig
from megatron_sts.cost.flops import planned_load, step_work
from megatron_sts.lds.mask import draw_mask
from megatron_sts.lds.placement import Placement
from megatron_sts.lds.round_sampler import round_sampler
from megatron_sts.lds.schedule import skip_probabilities

StepTime = Callable[[NDArray[np.float64], int], NDArray[np.float64]]
"""Time of a step from what its chunks compute for a micro-batch and the number of micro-batches."""

GRID_STEPS = 32
"""Steps of a stage, evenly spaced, that stand for all of them."""
MOST_OUTCOMES = 16_384
"""Of ``sampler: rounds``, over the grid: all that the first orders of its rounds can draw, as many orders as this allows."""


@dataclass(frozen=True)
class Steps:
    """Some steps of a stage under one layout, as outcomes that stand for them. Layer units."""

    work: NDArray[np.float64]
    """Decoder layers that chunk v of rank p runs, [outcomes, rows, vpp, pp]; one row for all micro-batches or one for each."""
    weights: NDArray[np.float64]
    """How likely each outcome is in each of the steps, [steps, outcomes]; rows sum to 1."""
    first: float
    """What the first rank computes besides layers."""
    last: float

    @property
    def totals(self) -> NDArray[np.float64]:
        """Work of all ranks, in the mean over micro-batches, [steps]."""
        return np.asarray(self.weights @ self.work.mean(axis=1).sum(axis=(1, 2)) + self.first + self.last)


def step_times(all_steps: Sequence[Steps], num_microbatches: int, step_time: StepTime) -> list[NDArray[np.float64]]:
    """Time of each step for each of its micro-batches, in layers, [steps] for each entry of ``all_steps``.

    These are one stage's, under several layouts; all schedules with equally many rounds are timed together.
    """
    starts = np.cumsum([0, *(len(steps.work) for steps in all_steps)])
    scheduled: dict[int, list[tuple[NDArray[np.int_], NDArray[np.float64]]]] = {}
    for vpp in sorted({steps.work.shape[2] for steps in all_steps}):
        places = [place for place, steps in enumerate(all_steps) if steps.work.shape[2] == vpp]
        numbers = np.concatenate([np.arange(starts[place], starts[place + 1]) for place in places])
        work = np.concatenate([all_steps[place].work for place in places])
        counts = num_active(work)
        for count in sorted(set(counts.tolist())):
            these = scheduled_work(work[counts == count], all_steps[0].first, all_steps[0].last)
            scheduled.setdefault(count, []).append((numbers[counts == count], these))
    times = np.empty(starts[-1])
    for parts in scheduled.values():
        together = np.concatenate([work for _, work in parts])
        times[np.concatenate([numbers for numbers, _ in parts])] = step_time(together, num_microbatches)
    return [
        steps.weights @ times[start:end] / num_microbatches
        for steps, start, end in zip(all_steps, starts, starts[1:], strict=False)
    ]


def num_active(work: NDArray[np.float64]) -> NDArray[np.int_]:
    """How many rounds are in each outcome's schedule: those of which any layer runs (``lds.rounds``), [outcomes]."""
    return np.asarray(work.any(axis=(1, 3)).sum(axis=1))


def scheduled_work(work: NDArray[np.float64], first: float, last: float) -> NDArray[np.float64]:
    """What the chunks of outcomes with equally many rounds compute, [outcomes, rows, rounds, pp]; one round at least."""
    active = work.any(axis=(1, 3))
    if active.any():
        rounds = np.nonzero(active)[1].reshape(len(work), 1, -1, 1)
        work = np.take_along_axis(work, rounds, axis=2)
    else:
        work = np.zeros_like(work[:, :, :1])
    work[:, :, 0, 0] += first
    work[:, :, -1, -1] += last
    return work


def grid(num_steps: int) -> list[int]:
    """``GRID_STEPS`` steps from the middles of equal parts of the stage, or all of them."""
    count = min(num_steps, GRID_STEPS)
    return [(2 * part + 1) * num_steps // (2 * count) for part in range(count)]


def layer_flops(resolved: Resolved, stage: ResolvedStage) -> int:
    """Training FLOPs of one decoder layer in one step of the stage: the unit of its placement's work."""
    return step_work(resolved, stage, planned_load(resolved, stage, stage.typical)).layer


@dataclass(frozen=True)
class Outcomes:
    """What a stage may skip in some steps."""

    skipped: NDArray[np.bool_]
    """[outcomes, rows, layers]; one row for all micro-batches or one for each."""
    weights: NDArray[np.float64]
    """How likely each outcome is in each of the steps, [steps, outcomes]; rows sum to 1."""

    def under(self, layout: Layout, place: Placement) -> Steps:
        """With these chunks."""
        counts = np.array(layout)
        ends = np.cumsum(counts)
        sums = np.pad(np.cumsum(~self.skipped, axis=-1, dtype=np.float64), [(0, 0), (0, 0), (1, 0)])
        work = (sums[..., ends] - sums[..., ends - counts.ravel()]).reshape(*self.skipped.shape[:2], *counts.shape)
        return Steps(work, self.weights, *besides_layers(place))


def drawn_steps(seed: int, stage: ResolvedStage, place: Placement, layout: Layout, steps: Sequence[int]) -> Steps:
    """``steps`` of a stage under a layout. ``place``: the stage's under any layout of as many pipeline ranks."""
    return drawn_outcomes(seed, stage, place.under(layout), steps).under(layout, place)


def dense_step(place: Placement, layout: Layout) -> Steps:
    """One step that skips nothing, under a layout."""
    return _no_skips(place, 1).under(layout, place)


def drawn_outcomes(
    seed: int, stage: ResolvedStage, place: Placement, steps: Sequence[int], most: int = MOST_OUTCOMES
) -> Outcomes:
    """The masks that the stage's sampler draws in ``steps``; of ``rounds`` all that it could; one that skips nothing without LDS."""
    lds = stage.config.lds
    if lds is None:
        return _no_skips(place, len(steps))
    if lds.sampler == "rounds":
        return _outcomes_of_rounds(lds, stage, place, steps, most)
    num = stage.num_microbatches
    masks = [draw_mask(lds, seed, stage.index, step, stage.num_steps, place, num) for step in steps]
    return Outcomes(np.array([mask.rows for mask in masks]), np.eye(len(steps)))


def _no_skips(place: Placement, num_steps: int) -> Outcomes:
    return Outcomes(np.zeros((1, 1, place.num_layers), dtype=np.bool_), np.ones((num_steps, 1)))


def _outcomes_of_rounds(
    lds: LdsConfig, stage: ResolvedStage, place: Placement, steps: Sequence[int], most: int
) -> Outcomes:
    num_blocks = place.num_rounds if lds.rounds == "layout" else lds.rounds
    most_orders = max(most // (len(steps) * (num_blocks + 1)), 1)
    probabilities = [skip_probabilities(lds, step, stage.num_steps, place.num_layers) for step in steps]
    drawn = [round_sampler(lds, each, place).outcomes(most_orders) for each in probabilities]
    bits = np.packbits(np.concatenate([skipped for skipped, _ in drawn]), axis=1)
    different, number = np.unique(bits, axis=0, return_inverse=True)
    weights = np.zeros((len(steps), len(different)))
    of_step = np.repeat(np.arange(len(steps)), [len(weight) for _, weight in drawn])
    np.add.at(weights, (of_step, number.ravel()), np.concatenate([weight for _, weight in drawn]))
    return Outcomes(np.unpackbits(different, axis=1, count=place.num_layers).astype(np.bool_)[:, None], weights)


def besides_layers(place: Placement) -> tuple[float, float]:
    """What the first and the last rank compute besides layers; with one rank the head is the last's."""
    return place.fixed_work[0] - (place.head_work if place.num_ranks == 1 else 0.0), place.head_work
