"""Skip frequencies over 20,000 draws, for every sampler, granularity and layout, with a stated error rate."""

from itertools import combinations
from statistics import NormalDist

import numpy as np
import pytest

from megatron_sts.config.schema import LdsConfig
from megatron_sts.lds.mask import draw_mask
from megatron_sts.lds.placement import Placement
from megatron_sts.lds.quota import equal_work_probabilities
from megatron_sts.lds.schedule import skip_probabilities
from tests.lds.layouts import LAYOUTS

NUM_DRAWS = 20_000
FAMILY = 18 * 2 * 12 + 2 * 45
"""Comparisons in this file: at most two rows of 12 layers in each of 18 cases, and twice 45 pairs."""
LARGEST_Z = NormalDist().inv_cdf(1 - 1e-6 / (2 * FAMILY))
"""Chance that any test of this file fails although the samplers are right: at most 4e-6 (Bonferroni; see z_scores)."""


def z_scores(skipped: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Of binomial counts over the first axis; with p (1 - p) n >= 475 a tail at 6 sigma is below 4 normal ones."""
    return (skipped.mean(0) - p) / np.sqrt(p * (1 - p) / len(skipped))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("granularity", ["step", "microbatch"])
@pytest.mark.parametrize("sampler", ["bernoulli", "balanced", "quota"])
def test_every_layer_is_skipped_as_often_as_its_probability(sampler: str, granularity: str, layout: str) -> None:
    # Rows of one step depend on each other (stratified offsets), steps do not: each row is counted on its own.
    lds, rows = LdsConfig(schedule="constant", sampler=sampler, granularity=granularity), 1 + (granularity != "step")
    placement, num_steps = LAYOUTS[layout], NUM_DRAWS // rows
    drawn = np.array([draw_mask(lds, 7, 1, step, num_steps, placement, rows).rows for step in range(num_steps)])
    p = skip_probabilities(lds, 0, num_steps, 12)
    if sampler == "quota":  # what it must change them to is tested beside it
        p = equal_work_probabilities(p, placement)
        assert (p > 0.05).all() and (p < 0.95).all()
    assert drawn.shape == (num_steps, rows, 12)
    assert np.abs(z_scores(drawn, p)).max() < LARGEST_Z


@pytest.mark.parametrize("rounds", [(0,) * 10, tuple(range(10))])
def test_balanced_pairs_come_up_alike(rounds: tuple[int, ...]) -> None:
    # One chunk of ten layers, or ten of one: neither the order in a chunk nor that of the rounds may be a fixed one.
    # Equal probabilities with a whole sum: 5 of 10 layers, every set equally likely, so a pair with 5 x 4 / (10 x 9).
    # In one fixed order neighbours would come up together never, and layers at distance 2 in every other draw.
    lds = LdsConfig(alpha=0.5, schedule="constant", depth_profile="flat", sampler="balanced")
    place = Placement((0,) * 10, rounds, (0.0,), 0.0)
    drawn = np.array([draw_mask(lds, 7, 1, step, NUM_DRAWS, place).row(0) for step in range(NUM_DRAWS)])
    together = np.stack([drawn[:, a] & drawn[:, b] for a, b in combinations(range(10), 2)], axis=1)
    assert together.shape[1] == 45 and np.abs(z_scores(together, np.array(2 / 9))).max() < LARGEST_Z
