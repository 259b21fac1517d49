"""Quota: the sum of probabilities is kept, work is as equal as it can be, and what that costs is reported."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sts.config.schema import LdsConfig
from megatron_sts.lds.effective import (
    effective_probabilities,
    executed_fraction,
    inverse_keep_scales,
    largest_change,
)
from megatron_sts.lds.placement import Placement
from megatron_sts.lds.quota import equal_work_probabilities
from megatron_sts.lds.schedule import mean_skip_fraction, skip_probabilities
from tests.lds.layouts import LAYOUTS, one_rank, placements

ROUNDING = 1e-9
"""Loads below 50 layers, found by a few dozen operations in double precision: errors of 1e-13."""

QUOTA = LdsConfig(sampler="quota")
TWO_OF_TWO = Placement((0, 0, 1, 1), (0,) * 4, (0.0, 1.0), 1.0)
"""Two ranks of two layers, the second with a head worth a layer."""
probability_values = st.one_of(st.sampled_from([0.0, 1.0, 1e-300, 5e-324]), st.floats(0, 1))


def with_probabilities(placement: Placement) -> st.SearchStrategy[tuple[Placement, np.ndarray]]:
    size = placement.num_layers
    return st.lists(probability_values, min_size=size, max_size=size).map(lambda p: (placement, np.array(p)))


cases = placements().flatmap(with_probabilities)


@given(cases)
def test_sum_is_kept_and_probabilities_stay_probabilities(case: tuple[Placement, np.ndarray]) -> None:
    placement, p = case
    changed = equal_work_probabilities(p, placement)
    assert (changed >= 0).all() and (changed <= 1).all() and (changed[p == 0] == 0).all()
    assert changed.sum() == pytest.approx(p.sum(), abs=ROUNDING)


@given(cases)
def test_no_shift_of_skips_between_ranks_would_level_the_work(case: tuple[Placement, np.ndarray]) -> None:
    # Optimality of waterfilling: a rank that could skip more has no more work than one that skips anything.
    placement, p = case
    owner, changed = np.array(placement.owner), equal_work_probabilities(p, placement)
    could_skip_more, skips = [], []
    for rank, fixed in enumerate(placement.fixed_work):
        own = owner == rank
        work = fixed + own.sum() - changed[own].sum()
        if changed[own].sum() < (p[own] > 0).sum() - ROUNDING:
            could_skip_more.append(work)
        if changed[own].sum() > ROUNDING:
            skips.append(work)
    assert max(could_skip_more, default=0.0) <= min(skips, default=np.inf) + ROUNDING


@given(cases)
def test_a_ranks_layers_are_scaled_by_one_factor_up_to_one(case: tuple[Placement, np.ndarray]) -> None:
    placement, p = case
    owner, changed = np.array(placement.owner), equal_work_probabilities(p, placement)
    for rank in range(placement.num_ranks):
        before, after = p[owner == rank], changed[owner == rank]
        free = (before > 1e-200) & (after < 1)  # below that a factor is no longer a normal number
        if free.any():
            factor = after[free].max() / before[free][after[free].argmax()]
            np.testing.assert_allclose(after, np.minimum(1, factor * before), rtol=1e-9, atol=1e-15)


def test_values_by_hand() -> None:
    # Two ranks of two layers, one with a head worth a layer: 2 + 3 layers of work, 1 skipped, so 2 on either rank.
    level = equal_work_probabilities(np.array([0.1, 0.3, 0.2, 0.4]), TWO_OF_TWO)
    np.testing.assert_allclose(level, [0, 0, 1 / 3, 2 / 3], atol=1e-15)
    # 1.6 skipped: 1.7 left on either rank, 0.3 and 1.3 skipped; 1.3 x 3/4 and 1.3 / 4.
    level = equal_work_probabilities(np.array([0.1, 0.3, 0.9, 0.3]), TWO_OF_TWO)
    np.testing.assert_allclose(level, [0.075, 0.225, 0.975, 0.325], rtol=1e-12)
    # 1.9 skipped, of which 1.45 on the second rank: one factor would give 1.16 and 0.29; one is clipped, 0.45 remains.
    level = equal_work_probabilities(np.array([0.3, 0.4, 0.96, 0.24]), TWO_OF_TWO)
    np.testing.assert_allclose(level, [0.45 * 3 / 7, 0.45 * 4 / 7, 1, 0.45], rtol=1e-12)


def test_equal_ranks_keep_the_schedule() -> None:
    flat = QUOTA.model_copy(update={"depth_profile": "flat"})
    assert largest_change(flat, range(20), 20, LAYOUTS["interleaved"]) < 1e-15
    assert largest_change(QUOTA, range(20), 20, one_rank(12)) < 1e-15


@pytest.mark.parametrize("sampler", ["bernoulli", "balanced"])
def test_other_samplers_change_nothing(sampler: str) -> None:
    lds = LdsConfig(sampler=sampler)
    assert largest_change(lds, range(20), 20, LAYOUTS["uneven"]) == 0
    np.testing.assert_array_equal(
        effective_probabilities(lds, 3, 20, LAYOUTS["uneven"]), skip_probabilities(lds, 3, 20, 12)
    )


def test_largest_change_is_the_papers_skew_at_the_first_step() -> None:
    # 80 layers, 8 ranks, 5 chunks of 2 each. Rank r's chunks start at 2r, 2r + 16, ..., so its mean p is off the
    # model's by alpha epsilon (2 x 2(r - 3.5)) / 79; its p are scaled by mean / (mean + that), most at its last layer.
    owner, rounds = [layer // 2 % 8 for layer in range(80)], [layer // 16 for layer in range(80)]
    placement = Placement(tuple(owner), tuple(rounds), (0.0,) * 8, 0.0)
    mean = [0.5 * (1 + 0.5 * 4 * (rank - 3.5) / 79) for rank in range(8)]
    last = [0.5 * (1 + 0.5 * (2 * (64 + 2 * rank + 1) - 79) / 79) for rank in range(8)]
    expected = max(abs(0.5 / m - 1) * p for m, p in zip(mean, last, strict=True))
    assert largest_change(QUOTA, range(100), 100, placement) == pytest.approx(expected, rel=1e-12)
    assert expected < 0.07


@given(st.sampled_from(["bernoulli", "balanced", "quota"]), st.sampled_from(sorted(LAYOUTS)), st.integers(1, 30))
def test_executed_fraction_keeps_the_runs_mean(sampler: str, layout: str, num_steps: int) -> None:
    lds = LdsConfig(sampler=sampler)
    executed = executed_fraction(lds, num_steps, LAYOUTS[layout])
    assert executed.shape == (12,) and (executed >= 0).all() and (executed <= 1).all()
    assert executed.mean() == pytest.approx(1 - mean_skip_fraction(lds, num_steps, 12), abs=ROUNDING)


def test_executed_fraction_by_hand() -> None:
    # Paper, E = 2: decay 1 and 1/4, mean 5/8; depth 1/2, 1, 3/2; alpha 1/2.
    np.testing.assert_allclose(executed_fraction(LdsConfig(), 2, one_rank(3)), 1 - 5 / 16 * np.array([0.5, 1, 1.5]))


def test_inverse_keep_uses_the_probabilities_that_are_drawn() -> None:
    assert inverse_keep_scales(LdsConfig(schedule="constant"), 0, 9, one_rank(3)) == pytest.approx((4 / 3, 2, 4))
    certain = LdsConfig(schedule="constant", alpha=1.0, epsilon=0.0)
    assert inverse_keep_scales(certain, 0, 9, one_rank(2)) == (1.0, 1.0)
    scales = inverse_keep_scales(QUOTA, 0, 9, LAYOUTS["contiguous"])
    np.testing.assert_allclose(1 / np.array(scales), 1 - effective_probabilities(QUOTA, 0, 9, LAYOUTS["contiguous"]))
