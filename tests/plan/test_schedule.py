"""The simulated schedule against closed forms, bounds and megatron-core's own tables; the bottleneck model against it."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sts.cost.pass_order import Pass, pass_order
from megatron_sts.plan.schedule import FORWARD_SHARE, bottleneck_time, schedule_time
from megatron_sts.plan.timeline import SIMULATED_GROUPS, Durations, timeline

SHAPES = [(2, 1, 5), (4, 1, 8), (4, 2, 8), (8, 5, 16), (3, 4, 12)]
ROUNDING = 1e-9
"""Sums of some thousand doubles of order one."""


@pytest.mark.parametrize(("pp", "vpp", "num_microbatches"), SHAPES)
def test_equal_chunks_take_the_published_time(pp: int, vpp: int, num_microbatches: int) -> None:
    """m t + (pp-1) t/vpp, arXiv 2104.04473 section 2.2, with t = vpp chunks of time 1."""
    expected = num_microbatches * vpp + pp - 1
    equal = np.ones((1, vpp, pp))
    assert schedule_time(equal, num_microbatches) == pytest.approx(expected, rel=ROUNDING)
    assert bottleneck_time(equal, num_microbatches) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize(("pp", "vpp", "num_microbatches"), [shape for shape in SHAPES if shape[1] > 1])
def test_order_is_megatrons(pp: int, vpp: int, num_microbatches: int) -> None:
    """Its schedule table lists (micro-batch, chunk); chunks count backwards in the backward pass."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table

    table = get_schedule_table(num_microbatches, vpp, pp)
    for rank in range(pp):
        group = SimpleNamespace(size=lambda: pp, rank=lambda rank=rank: rank)
        place = SimpleNamespace(pp_group=group, virtual_pipeline_model_parallel_size=vpp)
        total, _, num_warmup, _ = get_pp_rank_microbatches(num_microbatches, vpp, pp, p2p_communicator=place)
        order = pass_order(rank, pp, vpp, num_microbatches)
        assert [(each.microbatch, each.chunk) for each in order if each.is_forward] == table
        assert [(each.microbatch, vpp - 1 - each.chunk) for each in order if not each.is_forward] == table
        steady = [True] * num_warmup + [True, False] * (total - num_warmup) + [False] * num_warmup
        assert [each.is_forward for each in order] == steady


def test_order_without_interleaving() -> None:
    assert [(each.is_forward, each.microbatch) for each in pass_order(1, 3, 1, 3)] == [
        (True, 0),
        (True, 1),
        (False, 0),
        (True, 2),
        (False, 1),
        (False, 2),
    ]
    assert pass_order(2, 3, 1, 1) == [Pass(True, 0, 0), Pass(False, 0, 0)]


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(SHAPES), st.integers(0, 2**32 - 1), st.booleans())
def test_no_rank_is_done_before_its_work_and_none_after_all(
    shape: tuple[int, int, int], seed: int, of_each: bool
) -> None:
    pp, vpp, m = shape
    work = np.random.default_rng(seed).uniform(0, 2, (m if of_each else 1, vpp, pp))
    time = schedule_time(work, m)
    everything = np.broadcast_to(work, (m, vpp, pp))
    assert everything.sum(axis=(0, 1)).max() * (1 - ROUNDING) <= time <= everything.sum() * (1 + ROUNDING)
    assert everything[0].sum() * (1 - ROUNDING) <= time  # the first micro-batch passes every chunk, there and back


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(0, 2**32 - 1))
def test_one_chunk_a_rank_is_as_the_bottleneck_model_says(pp: int, seed: int) -> None:
    """Contiguous stages, works within +-50 %: the model is out by what fill and drain hide beside the slowest rank."""
    work, m = np.random.default_rng(seed).uniform(0.5, 1.5, (1, 1, pp)), SIMULATED_GROUPS * pp
    model, simulated = bottleneck_time(work, m), schedule_time(work, m)
    hidden = work.sum() - work.max()  # at most the whole fill and drain
    assert model - hidden - ROUNDING <= simulated <= model + ROUNDING


def test_interleaved_ranks_wait_for_each_other_where_the_bottleneck_model_sees_nothing() -> None:
    """Ranks of equal work whose chunks are busy in turn: 4 ranks x 2 chunks, (2, 0) on even and (0, 2) on odd ranks."""
    work = np.array([[[2.0, 0.0, 2.0, 0.0], [0.0, 2.0, 0.0, 2.0]]])
    assert schedule_time(work, 16) > 1.1 * bottleneck_time(work, 16)


def test_many_micro_batches_are_extrapolated() -> None:
    """Equal chunks exactly; else the rate of the second half stands for the rest: here within 1 %."""
    assert schedule_time(np.ones((1, 2, 4)), 400) == pytest.approx(803, rel=ROUNDING)
    work = np.random.default_rng(0).uniform(0.5, 1.5, (1, 2, 4))
    every_pass = timeline(Durations(FORWARD_SHARE * work, (1 - FORWARD_SHARE) * work), 160)
    assert schedule_time(work, 160) == pytest.approx(max(event.end_s for event in every_pass), rel=0.01)


def test_times_of_many_steps_at_once() -> None:
    work = np.random.default_rng(0).uniform(0, 2, (3, 5, 8, 2, 4))
    together = schedule_time(work, 8)
    assert together.shape == (3, 5)
    assert together[1, 2] == pytest.approx(schedule_time(work[1, 2], 8), rel=ROUNDING)
