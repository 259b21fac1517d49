"""Plans that skip by rounds: what they reach, that steps are timed with the rounds they have, and what else they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_sts.config.resolve import Layout, Resolved, ResolvedStage, resolve
from megatron_sts.cost.memory import memory_per_rank
from megatron_sts.lds.effective import executed_fraction
from megatron_sts.lds.mask import SkipMask, draw_mask
from megatron_sts.lds.placement import placement
from megatron_sts.lds.rounds import active_rounds
from megatron_sts.plan import rough
from megatron_sts.plan.comparison import Planned, plan_with, with_sampler
from megatron_sts.plan.layout import choose_layout, run_time, run_times
from megatron_sts.plan.relayout import best_relayout
from megatron_sts.plan.savings import savings
from megatron_sts.plan.schedule import schedule_time
from megatron_sts.plan.steps import MOST_OUTCOMES, Steps, drawn_steps, grid, num_active, scheduled_work, step_times
from tests.plan.runs import draft, written

ROUNDING = 1e-9
"""Sums of some thousand doubles of order one."""
SHORT_OF_BOUND = {2: 0.04, 8: 0.03}
"""Most that the efficiency may lack, for 2 and 8 micro-batches a pipeline rank."""
HEAVY_HEAD = (32, 4, "7B", 2.41, 8)
"""Lacks 0.031: beside chunks of two layers a head of 2.41 makes all ranks wait 0.41 of a layer in each step, also in the shortest;
with larger chunks there are too few of them."""
TARGETS = [
    (32, 4, "7B", 0.65, 2),
    (32, 4, "7B", 0.65, 8),
    (32, 4, "7B", 2.41, 2),
    HEAVY_HEAD,
    (80, 8, "70B", 1.23, 2),
    (80, 8, "70B", 1.23, 8),
    (80, 16, "70B", 1.23, 2),
    (80, 16, "70B", 1.23, 8),
    (126, 16, "405B", 0.66, 2),
    (126, 16, "405B", 0.66, 8),
]


def run_with_head(num_layers: int, pp: int, shape: str, head: float, num_microbatches: int) -> Resolved:
    """With a frozen CLIP-L in front, and a vocabulary for which the head costs so many layers."""

    def of(vocab_size: int | None) -> Resolved:
        lds = {"sampler": "rounds"}
        return draft(num_layers, pp, lds, shape=shape, num_microbatches=num_microbatches, vocab_size=vocab_size)

    usual = of(None)
    per_word = placement(usual, usual.stages[0]).head_work / usual.config.model.language.vocab_size
    found = of(round(head / per_word))
    assert placement(found, found.stages[0]).head_work == pytest.approx(head, abs=1e-3)
    return found


@pytest.mark.parametrize("case", TARGETS)
def test_target(case: tuple[int, int, str, float, int]) -> None:
    num_layers, pp, shape, head, per_rank = case
    run = run_with_head(num_layers, pp, shape, head, per_rank * pp)
    dense = with_sampler(run, None)
    dense_layout = choose_layout(dense)
    planned = plan_with(run, dense_layout)
    m, v = per_rank * pp, len(planned.layout)
    assert planned.bound == pytest.approx(m * v / (m * v + pp - 1))
    lacks = planned.bound - planned.efficiency
    if case == HEAVY_HEAD:
        assert SHORT_OF_BOUND[per_rank] < lacks < 0.04
    else:
        assert lacks <= SHORT_OF_BOUND[per_rank]
    assert efficiency_by_hand(planned, run, dense_layout) == pytest.approx(planned.efficiency)


def efficiency_by_hand(planned: Planned, run: Resolved, dense_layout: Layout) -> float:
    """From the mean time and mean work of what may be drawn."""
    [stage], place = run.stages, placement(run, run.stages[0])
    steps = drawn_steps(run.config.seed, stage, place, planned.layout, grid(stage.num_steps))
    time = step_times([steps], stage.num_microbatches, schedule_time)[0].mean()
    [dense] = with_sampler(run, None).stages
    whole = drawn_steps(0, dense, place, dense_layout, [0])
    dense_time = step_times([whole], stage.num_microbatches, schedule_time)[0].mean()
    saved = 1 - steps.totals.mean() / whole.totals[0]
    return float((1 - time / dense_time) / saved)


LAYOUT: Layout = ((1, 1), (2, 1), (0, 0), (1, 2), (1, 1))


def small(lds: dict[str, Any] | None, layout: Layout = LAYOUT, **options: Any) -> tuple[Resolved, ResolvedStage]:
    run = resolve(
        written(sum(map(sum, layout)), len(layout[0]), lds, shape="7B", **options), choose_layout=lambda _: layout
    )
    return run, run.stages[0]


def test_a_step_is_timed_with_the_rounds_that_run() -> None:
    """Tower and head move to the first and the last of them; a step without any is one unit of these two."""
    work = np.array([[[[1.0, 1], [0, 0], [2, 1], [0, 1]]], [[[0, 0], [1, 0], [1, 1], [0, 2.0]]]])
    assert num_active(work).tolist() == [3, 3]
    left = scheduled_work(work, first=0.5, last=0.25)
    assert left.tolist() == [[[[1.5, 1], [2, 1], [0, 1.25]]], [[[1.5, 0], [1, 1], [0, 2.25]]]]
    nothing = scheduled_work(np.zeros((1, 1, 4, 2)), first=0.5, last=0.25)
    assert nothing.tolist() == [[[[0.5, 0.25]]]]
    both = Steps(np.concatenate([work, np.zeros((1, 1, 4, 2))]), np.array([[0.5, 0.25, 0.25]]), 0.5, 0.25)
    [time] = step_times([both], 4, schedule_time)
    parts = [float(schedule_time(each, 4)) for each in (left[0], left[1], nothing[0])]
    assert time == pytest.approx(np.dot([0.5, 0.25, 0.25], parts) / 4, rel=ROUNDING)


@pytest.mark.parametrize(
    "lds",
    [{"sampler": "bernoulli"}, {"sampler": "balanced", "granularity": "microbatch"}, {"sampler": "fixed", "fixed_layers": [2, 3, 4]}],
)  # fmt: skip
def test_rounds_in_the_schedule_are_those_of_the_engine(lds: dict[str, Any]) -> None:
    run, stage = small(lds, num_microbatches=4)
    steps = drawn_steps(run.config.seed, stage, placement(run, stage), LAYOUT, range(40))
    place = placement(run, stage)
    masks = [draw_mask(stage.config.lds, run.config.seed, 0, step, 1000, place, 4) for step in range(40)]  # type: ignore[arg-type]
    active = [active_rounds(mask, LAYOUT) for mask in masks]
    assert [tuple(np.flatnonzero(work.any(axis=(0, 2)))) for work in steps.work] == active
    assert len(set(active)) > 1 or lds["sampler"] == "fixed"


def test_dense_steps_leave_out_rounds_without_layers() -> None:
    run, _ = small(None, num_microbatches=4)
    without = tuple(counts for counts in LAYOUT if sum(counts))
    assert run_time(run, LAYOUT) == pytest.approx(run_time(run, without), rel=ROUNDING)


def test_what_rounds_may_draw_is_what_they_draw() -> None:
    """Mean time of 1,000 masks against that of all outcomes: within 4 standard errors."""
    run, stage = small({"sampler": "rounds", "schedule": "constant"}, num_microbatches=4)
    place, lds = placement(run, stage), stage.config.lds
    assert lds is not None
    steps = drawn_steps(run.config.seed, stage, place, LAYOUT, [0])
    [expected] = step_times([steps], 4, schedule_time)
    assert steps.weights.sum() == pytest.approx(1)
    masks = [draw_mask(lds, seed, 0, 0, 1000, place) for seed in range(1000)]
    of_mask = {mask.rows: time_of(mask, steps) for mask in {mask.rows: mask for mask in masks}.values()}
    times = np.array([of_mask[mask.rows] for mask in masks])
    assert abs(times.mean() - expected[0]) < 4 * times.std() / np.sqrt(len(times))
    skipped = np.mean([mask.num_skipped for mask in masks])
    assert steps.totals[0] == pytest.approx(place.num_layers - skipped + steps.first + steps.last, abs=0.1)


def time_of(mask: SkipMask, steps: Steps) -> float:
    ends = np.cumsum(np.ravel(LAYOUT))
    runs = np.array([sum(not skipped for skipped in mask.rows[0][end - count : end]) for end, count in zip(ends, np.ravel(LAYOUT), strict=True)])  # fmt: skip
    work = runs.reshape(1, 1, *np.shape(LAYOUT)).astype(float)
    return float(schedule_time(scheduled_work(work, steps.first, steps.last), 4)[0]) / 4


def test_the_quick_model_is_right_where_it_looks_as_closely(monkeypatch: pytest.MonkeyPatch) -> None:
    """For even chunks, whose draws it takes for the others too."""
    monkeypatch.setattr(rough, "ROUGH_STRIDE", 1)
    monkeypatch.setattr(rough, "ROUGH_OUTCOMES", MOST_OUTCOMES)
    run = draft(16, 4, {"sampler": "rounds"}, shape="70B", num_microbatches=8)
    even: Layout = ((1,) * 4,) * 4
    assert rough.RoughTimes(run, schedule_time)([even]) == pytest.approx(run_times(run, [even]), rel=2e-3)


def test_skipping_frees_no_memory() -> None:
    run, stage = small({"sampler": "rounds"}, num_microbatches=4)
    dense = with_sampler(run, None)
    assert memory_per_rank(run, stage) == memory_per_rank(dense, dense.stages[0])


def test_idle_layers_save_communication_and_updates() -> None:
    """Shares of all trained parameters: embedding, projector and head are never idle, skipped layers are as often as p' says."""
    options = {"num_microbatches": 4, "data_parallel_size": 2, "use_distributed_optimizer": True}
    run, stage = small({"sampler": "rounds", "schedule": "constant"}, **options)
    place, lds = placement(run, stage), stage.config.lds
    assert lds is not None
    h, f, words, patches = 4096, 11008, 32000, 1024
    layer = 4 * h * h + 3 * h * f + 2 * h
    trained = 10 * layer + 2 * words * h + h + (patches + 1) * h + (h + 1) * h
    saved = savings(run, stage, lds)
    idle = (1 - executed_fraction(lds, 1000, place)).sum() * layer / trained
    assert saved.updated == pytest.approx(idle) and saved.reduced == saved.gathered == saved.updated
    assert len(saved.of_ranks) == 2 and min(saved.of_ranks) < saved.updated < max(saved.of_ranks)
    moving = savings(run, stage, lds.model_copy(update={"skipped_update": "zero_grad"}))
    assert (moving.reduced, moving.gathered, moving.updated) == (saved.reduced, 0, 0)
    late, stage = small(
        {"sampler": "rounds", "schedule": "constant"}, **options, overlap_grad_reduce=True, overlap_param_gather=True
    )
    assert savings(late, stage, lds.model_copy(update={"skipped_update": "zero_grad"})).gathered == saved.gathered
    alone, stage = small({"sampler": "rounds"}, num_microbatches=4)
    assert savings(alone, stage, lds).reduced is None and savings(alone, stage, lds).gathered is None
    of_step, of_each = (
        savings(run, run.stages[0], run.stages[0].config.lds).updated  # type: ignore[arg-type]
        for granularity in ("step", "microbatch")
        for run, _ in [small({"sampler": "bernoulli", "granularity": granularity}, **options)]
    )
    assert 0 < of_each < of_step / 2  # both micro-batches skip the layer


def test_another_layout_from_a_checkpoint_on_is_proposed_where_it_pays() -> None:
    """A stage that skips half of its layers and then none: its two halves planned for themselves."""
    points = ((0.0, 1.0), (0.5, 1.0), (0.501, 0.0), (1.0, 0.0))
    lds = {"sampler": "balanced", "schedule": "piecewise", "schedule_points": points}
    run = draft(16, 4, lds, shape="7B", num_microbatches=8)
    dense_layout, layout = choose_layout(with_sampler(run, None)), choose_layout(run)
    found = best_relayout(run, layout, dense_layout)
    assert found.stage == "only" and found.step == 500 and found.after == dense_layout != found.before
    steady = draft(16, 4, {"sampler": "balanced", "schedule": "constant"}, shape="7B", num_microbatches=8)
    halves = run_time(steady, found.before) + run_time(with_sampler(run, None), dense_layout)
    assert found.gain == pytest.approx(
        1 - halves / 2 / run_time(run, layout), abs=0.005
    )  # other masks of the same sampler
    assert found.gain > 0.01
    even = draft(16, 4, {"sampler": "rounds"}, num_microbatches=8)
    assert best_relayout(even, choose_layout(even), choose_layout(with_sampler(even, None))).gain < 0.01
