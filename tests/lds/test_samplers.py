"""Samplers: what holds for every draw, whatever the probabilities, the layout and the random words."""

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sts.config.schema import LdsConfig
from megatron_sts.lds.effective import effective_probabilities
from megatron_sts.lds.mask import draw_mask
from megatron_sts.lds.placement import Placement
from megatron_sts.lds.samplers import balanced, stratified_offsets
from tests.lds.layouts import LAYOUTS, one_rank, placements

ROUNDING = 1e-9
"""Sums of at most 40 probabilities, each rounded to 2^-53, are off by far less."""
SAMPLERS = ("bernoulli", "balanced", "quota")

seeds = st.integers(0, 2**63 - 1)
words = st.integers(0, 2**64 - 1)
# 0 and 1 often: at the edges of the cumulative sums rounding would show. Tenths add up to whole numbers only nearly.
probability_values = st.one_of(st.sampled_from([0.0, 1.0, 0.1, 0.2, 0.3, 1 - 2**-53, 2**-60]), st.floats(0, 1))


@st.composite
def balanced_draws(draw: st.DrawFn) -> tuple[np.ndarray, Placement, np.ndarray]:
    """Probabilities, layout, and a mask drawn with any words and any offset, the extreme ones often."""
    placement = draw(placements())
    size = placement.num_layers
    probabilities = np.array(draw(st.lists(probability_values, min_size=size, max_size=size)))
    keys = np.array([draw(st.lists(words, min_size=size, max_size=size))], dtype=np.uint64)
    of_rounds = np.array([draw(st.lists(words, min_size=4, max_size=4))], dtype=np.uint64)
    offset = np.array([draw(st.one_of(st.sampled_from([0, 1, 2**53 - 1]), st.integers(0, 2**53 - 1)))], dtype=np.uint64)
    owner, rounds = np.array(placement.owner), np.array(placement.round)
    return probabilities, placement, balanced(probabilities, owner, rounds, keys, of_rounds, offset)[0]


def per_rank(values: np.ndarray, placement: Placement) -> list[float]:
    """Exactly rounded sums over each rank's layers."""
    owner = np.array(placement.owner)
    return [math.fsum(values[owner == rank]) for rank in range(placement.num_ranks)]


@given(balanced_draws())
def test_balanced_counts_are_the_expected_ones_rounded(drawn: tuple[np.ndarray, Placement, np.ndarray]) -> None:
    probabilities, placement, skipped = drawn
    expected, counts = per_rank(probabilities, placement), per_rank(skipped, placement)
    for mean, count in zip(expected, counts, strict=True):
        assert math.floor(mean - ROUNDING) <= count <= math.ceil(mean + ROUNDING)
    for (mean_a, count_a), (mean_b, count_b) in combinations(zip(expected, counts, strict=True), 2):
        difference = mean_a - mean_b
        assert math.floor(difference - ROUNDING) <= count_a - count_b <= math.ceil(difference + ROUNDING)


@given(balanced_draws())
def test_a_chunk_skips_its_expected_number_rounded(drawn: tuple[np.ndarray, Placement, np.ndarray]) -> None:
    probabilities, placement, skipped = drawn
    chunk = np.array(placement.owner) * placement.num_rounds + np.array(placement.round)
    for number in np.unique(chunk):
        mean, count = math.fsum(probabilities[chunk == number]), skipped[chunk == number].sum()
        assert math.floor(mean - ROUNDING) <= count <= math.ceil(mean + ROUNDING)


@given(st.lists(st.lists(probability_values, max_size=5), min_size=1, max_size=5), st.integers(1, 4), st.data())
def test_ranks_with_equal_chunk_sums_skip_the_same_count_in_every_round(
    chunks: list[list[float]], num_ranks: int, data: st.DataObject
) -> None:
    # Every rank has the same probabilities in a round, each in an order of its own: sums equal to the last bit.
    p = [value for chunk in chunks for _ in range(num_ranks) for value in data.draw(st.permutations(chunk))]
    owner = np.array([rank for chunk in chunks for rank in range(num_ranks) for _ in chunk], dtype=int)
    rounds = np.array([number for number, chunk in enumerate(chunks) for _ in chunk * num_ranks], dtype=int)
    keys = np.array([data.draw(st.lists(words, min_size=len(p), max_size=len(p)))], dtype=np.uint64)
    of_rounds = np.array([data.draw(st.lists(words, min_size=len(chunks), max_size=len(chunks)))], dtype=np.uint64)
    offset = np.array([data.draw(st.integers(0, 2**53 - 1))], dtype=np.uint64)
    [skipped] = balanced(np.array(p), owner, rounds, keys, of_rounds, offset)
    for number in range(len(chunks)):
        assert len({skipped[(owner == rank) & (rounds == number)].sum() for rank in range(num_ranks)}) == 1


@given(balanced_draws())
def test_balanced_never_skips_at_zero_and_always_at_one(drawn: tuple[np.ndarray, Placement, np.ndarray]) -> None:
    probabilities, _, skipped = drawn
    assert not skipped[probabilities == 0].any() and skipped[probabilities == 1].all()


@given(placements(max_layers=12), st.data())
def test_balanced_marginals_are_exact_in_every_order(placement: Placement, data: st.DataObject) -> None:
    # Over N offsets at equal distances a stretch of length p holds N p points, up to one more or less.
    size, num_offsets = placement.num_layers, 512
    probabilities = np.array(data.draw(st.lists(probability_values, min_size=size, max_size=size)))
    order = np.array(data.draw(st.lists(words, min_size=size, max_size=size)), dtype=np.uint64)
    of_rounds = np.array(data.draw(st.lists(words, min_size=4, max_size=4)), dtype=np.uint64)
    offsets = np.arange(num_offsets, dtype=np.uint64) * np.uint64(2**53 // num_offsets)
    owner, rounds = np.array(placement.owner), np.array(placement.round)
    tiled = np.tile(order, (num_offsets, 1)), np.tile(of_rounds, (num_offsets, 1))
    skipped = balanced(probabilities, owner, rounds, *tiled, offsets)
    assert np.abs(skipped.sum(0) - num_offsets * probabilities).max() <= 1 + ROUNDING


@given(st.integers(1, 70), seeds)
def test_offsets_of_a_step_are_evenly_spaced(rows: int, seed: int) -> None:
    drawn = np.random.default_rng(seed).integers(0, 2**64, size=(rows, 2), dtype=np.uint64)
    offsets = stratified_offsets(drawn)
    assert offsets[np.argsort(drawn[:, 0])[0]] == drawn[0, 1] >> np.uint64(11)
    spacing = np.diff(np.sort(offsets), append=np.sort(offsets)[:1] + np.uint64(2**53)).astype(float)
    # In units of 2^-53 and rounded down to whole ones: two neighbours differ from the mean by less than one.
    assert offsets.max() < 2**53 and np.abs(spacing - 2**53 / rows).max() <= 1


@given(st.sampled_from(["balanced", "quota"]), st.sampled_from(sorted(LAYOUTS)), st.integers(1, 12), seeds)
def test_a_step_of_microbatches_skips_its_expected_number_rounded(
    sampler: str, layout: str, rows: int, seed: int
) -> None:
    lds, placement = LdsConfig(sampler=sampler, granularity="microbatch"), LAYOUTS[layout]
    mask = draw_mask(lds, seed, 0, 1, 9, placement, rows)
    assert len(mask.rows) == rows
    expected = rows * effective_probabilities(lds, 1, 9, placement)
    counts = per_rank(np.array(mask.rows).sum(0), placement)
    for mean, count in zip(per_rank(expected, placement), counts, strict=True):
        assert math.floor(mean - ROUNDING) <= count <= math.ceil(mean + ROUNDING)


def test_stratified_offsets_lower_the_variance_of_a_steps_load() -> None:
    # One rank, S = 12 x 0.3 = 3.6, 4 micro-batches: 14.4 layers a step, so 14 or 15 with variance 0.4 x 0.6 = 0.24.
    # Independent offsets would give 4 x 0.24, independent layers 48 x 0.21 = 10.08.
    lds = LdsConfig(alpha=0.3, epsilon=0.0, schedule="constant", sampler="balanced", granularity="microbatch")
    counts = [4 * draw_mask(lds, 11, 0, step, 2000, one_rank(12), 4).num_skipped for step in range(2000)]
    assert set(counts) == {14.0, 15.0}
    # Standard error of a two-point variable's sample variance: |1 - 2 f| sqrt(f (1 - f) / n) = 0.0022; six of them.
    assert abs(np.var(counts) - 0.24) < 6 * 0.0022 + 0.24 / 2000


@given(st.sampled_from(SAMPLERS), placements(), seeds, st.integers(0, 9), st.integers(0, 99), st.integers(1, 5))
def test_masks_are_pure_functions(
    sampler: str, placement: Placement, seed: int, stage: int, step: int, rows: int
) -> None:
    lds = LdsConfig(sampler=sampler, granularity="microbatch")
    mask = draw_mask(lds, seed, stage, step, 100, placement, rows)
    np.random.seed(0)  # no global state is read
    draw_mask(lds, seed, stage, 99 - step, 100, placement, rows)
    assert draw_mask(lds, seed, stage, step, 100, placement, rows) == mask


@given(placements(), seeds, st.integers(0, 99), st.integers(1, 5), st.integers(0, 5))
def test_a_bernoulli_mask_does_not_depend_on_the_layout(
    placement: Placement, seed: int, step: int, rows: int, more: int
) -> None:
    alone, per_step = one_rank(placement.num_layers), LdsConfig()
    per_microbatch = LdsConfig(granularity="microbatch")
    expected = draw_mask(per_step, seed, 1, step, 100, alone)
    assert draw_mask(per_step, seed, 1, step, 100, placement, rows) == expected
    mask = draw_mask(per_microbatch, seed, 1, step, 100, placement, rows)
    assert mask.rows == draw_mask(per_microbatch, seed, 1, step, 100, alone, rows + more).rows[:rows]
    assert mask.row(0) == expected.row(0)


@given(seeds, st.integers(0, 99), st.integers(1, 9), st.sampled_from(["paper", "constant"]))
def test_a_bernoulli_mask_is_what_it_was_before_there_were_other_samplers(
    seed: int, step: int, num_layers: int, schedule: str
) -> None:
    # The formula of the first release, in plain Python.
    raw = np.random.Philox(key=[seed, 2], counter=[0, step, 0, 1]).random_raw(num_layers)
    decay = ((100 - step) / 100) ** 2 if schedule == "paper" else 1.0
    for layer, skipped in enumerate(
        draw_mask(LdsConfig(schedule=schedule), seed, 2, step, 100, one_rank(num_layers)).row(0)
    ):
        p = 0.5 * decay * (1 + 0.5 * (2 * layer - (num_layers - 1)) / (num_layers - 1) if num_layers > 1 else 1)
        uniform = int(raw[layer] >> np.uint64(11)) / 2**53
        assert skipped == (uniform < p) or abs(uniform - p) < 1e-15


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [("balanced", ("0100010001111011", "1000001110111000")), ("quota", ("0001001001111101", "0001111000010110"))],
)
def test_masks_are_the_same_in_later_versions(sampler: str, expected: tuple[str, ...]) -> None:
    lds = LdsConfig(sampler=sampler, granularity="microbatch")
    placement = Placement((0, 0, 1, 1) * 4, (0,) * 16, (0.5, 2.0), 2.0)
    mask = draw_mask(lds, 1234, 1, 3, 100, placement, 2)
    assert tuple("".join("01"[skip] for skip in row) for row in mask.rows) == expected


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_extreme_probabilities(sampler: str) -> None:
    everything = LdsConfig(alpha=1.0, epsilon=0.0, schedule="constant", sampler=sampler)
    nothing = LdsConfig(alpha=0.0, sampler=sampler)
    for step in range(50):
        assert draw_mask(everything, 0, 0, step, 50, LAYOUTS["uneven"]).num_skipped == 12
        assert draw_mask(nothing, 0, 0, step, 50, LAYOUTS["uneven"]).num_skipped == 0
