"""The timeline with transfers and unequal passes against a simulation that knows nothing of how it is made."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from megatron_sts.cost.pass_order import pass_order
from megatron_sts.plan.timeline import Durations, idle_share, step_seconds, timeline

TICKS = 1e-9
"""Relative; sums of some hundred doubles."""
SHAPES = [(1, 1, 3), (2, 1, 5), (4, 1, 6), (2, 3, 4), (4, 2, 8), (3, 4, 6)]


def worked_off(forward: np.ndarray, backward: np.ndarray, num: int, send: float, waits: bool) -> float:
    """The end of a step: again and again, the rank that can begin soonest does what is next in its order."""
    vpp, pp = forward.shape
    left = [list(pass_order(rank, pp, vpp, num)) for rank in range(pp)]
    free, done = [0.0] * pp, {}

    def ready(rank: int) -> float | None:
        each = left[rank][0]
        position = each.chunk * pp + rank
        before = position - 1 if each.is_forward else position + 1
        if each.is_forward and before < 0:
            return free[rank]
        if not each.is_forward and before == vpp * pp:
            needed, here = (True, position, each.microbatch), True
        else:
            needed, here = (each.is_forward, before, each.microbatch), before % pp == rank
        return None if needed not in done else max(free[rank], done[needed] + (0.0 if here else send))

    while any(left):
        starts = {rank: ready(rank) for rank in range(pp) if left[rank]}
        rank = min((rank for rank, start in starts.items() if start is not None), key=lambda rank: starts[rank])
        each = left[rank].pop(0)
        end = starts[rank] + (forward if each.is_forward else backward)[each.chunk, rank]
        done[each.is_forward, each.chunk * pp + rank, each.microbatch] = end
        free[rank] = end + (send if waits and pp > 1 else 0.0)
    return max(done.values())


@pytest.mark.parametrize(("pp", "vpp", "num"), SHAPES)
@pytest.mark.parametrize("waits", [False, True])
def test_equals_a_simulation_by_events(pp: int, vpp: int, num: int, waits: bool) -> None:
    random = np.random.default_rng(pp * 100 + vpp)
    for _ in range(5):
        forward, backward = random.uniform(0.5, 2, (2, vpp, pp))
        send = float(random.uniform(0, 0.5))
        durations = Durations(forward[None], backward[None], send, waits)
        expected = worked_off(forward, backward, num, send, waits)
        assert float(step_seconds(durations, num)) == pytest.approx(expected, rel=TICKS)
        assert max(event.end_s for event in timeline(durations, num)) == pytest.approx(expected, rel=TICKS)


@pytest.mark.parametrize(("pp", "vpp", "num"), [(4, 1, 8), (4, 2, 8), (8, 5, 16), (2, 3, 10)])
def test_equal_chunks_wait_for_the_closed_form(pp: int, vpp: int, num: int) -> None:
    """(pp-1)/(m v) of the time that is worked (arXiv 2104.04473, section 2.2)."""
    each = np.ones((1, vpp, pp))
    idle = float(idle_share(Durations(each, 2 * each), num))
    assert idle / (1 - idle) == pytest.approx((pp - 1) / (num * vpp), rel=TICKS)


def test_passes_of_a_rank_do_not_overlap() -> None:
    random = np.random.default_rng(0)
    events = timeline(Durations(*random.uniform(0.5, 2, (2, 8, 2, 4)), 0.1, True), 8)
    assert len(events) == 2 * 8 * 2 * 4
    for rank in range(4):
        mine = sorted((event.start_s, event.end_s) for event in events if event.rank == rank)
        assert all(end <= start for (_, end), (start, _) in pairwise(mine))
