"""Masks: purity, digests, and marginals with a stated error rate."""

import dataclasses
import subprocess
import sys
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sts.config.schema import LdsConfig
from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask, dense_mask, draw_mask
from megatron_sts.lds.schedule import skip_probabilities
from tests.lds.layouts import one_rank

NUM_DRAWS = 20_000
FALSE_ALARM = 1e-6
"""Chance that a test below fails although the sampler is right, over all comparisons it makes (Bonferroni)."""

counts = st.integers(0, 2**63 - 1)


def test_marginals_and_pairs_have_the_stated_probabilities() -> None:
    # Binomial counts of 20,000 draws against z bounds: L marginals and L - 1 pairs of neighbouring layers.
    lds, num_layers = LdsConfig(schedule="constant"), 8
    drawn = np.array([draw_mask(lds, 7, 1, step, NUM_DRAWS, one_rank(num_layers)).row(0) for step in range(NUM_DRAWS)])
    p = skip_probabilities(lds, 0, NUM_DRAWS, num_layers)
    observed = np.concatenate([drawn.mean(0), (drawn[:, 1:] & drawn[:, :-1]).mean(0)])
    expected = np.concatenate([p, p[1:] * p[:-1]])
    z = (observed - expected) / np.sqrt(expected * (1 - expected) / NUM_DRAWS)
    assert np.abs(z).max() < NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * z.size))


def test_consecutive_steps_seeds_stages_and_microbatches_are_uncorrelated() -> None:
    # Agreement of two independent masks at p = 1/2 is Binomial(NUM_DRAWS, 1/2).
    lds, num_layers = LdsConfig(schedule="constant", epsilon=0.0, granularity="microbatch"), 20
    steps = NUM_DRAWS // num_layers

    def bits(seed: int, stage: int, first: int, microbatch: int = 0) -> np.ndarray:
        drawn = [
            draw_mask(lds, seed, stage, step, steps + 1, one_rank(num_layers), 2).row(microbatch)
            for step in range(first, first + steps)
        ]
        return np.array(drawn)

    base = bits(7, 1, 0)
    others = bits(7, 1, 1), bits(8, 1, 0), bits(7, 2, 0), bits(1, 7, 0), bits(7, 1, 0, microbatch=1)
    agreements = [(base == other).mean() for other in others]
    z = (np.array(agreements) - 0.5) / (0.5 / np.sqrt(NUM_DRAWS))
    assert np.abs(z).max() < NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * z.size))


def test_mean_over_a_run_is_a_third_of_alpha() -> None:
    # Sum of independent Bernoullis: variance sum p (1 - p); discretisation error alpha (1/(2E) + 1/(6E^2)).
    lds, num_steps, num_layers = LdsConfig(), 1000, 12
    p = np.stack([skip_probabilities(lds, step, num_steps, num_layers) for step in range(num_steps)])
    skipped = sum(draw_mask(lds, 3, 0, step, num_steps, one_rank(num_layers)).num_skipped for step in range(num_steps))
    sampling = NormalDist().inv_cdf(1 - FALSE_ALARM / 2) * np.sqrt((p * (1 - p)).sum()) / p.size
    assert abs(skipped / p.size - lds.alpha / 3) < sampling + lds.alpha * (1 / 2000 + 1 / 6e6)


@given(counts, st.integers(0, 9), st.integers(0, 99), st.integers(1, 40))
def test_a_mask_is_a_pure_function(seed: int, stage: int, step: int, num_layers: int) -> None:
    lds = LdsConfig()
    mask = draw_mask(lds, seed, stage, step, 100, one_rank(num_layers))
    np.random.seed(0)  # no global state is read
    for other in (step, 99 - step):
        draw_mask(lds, seed, stage, other, 100, one_rank(num_layers))
    assert draw_mask(lds, seed, stage, step, 100, one_rank(num_layers)) == mask
    # A layer's number does not depend on how many layers follow: same bits under a profile that ignores L.
    flat = LdsConfig(depth_profile="flat")
    longer = draw_mask(flat, seed, stage, step, 100, one_rank(num_layers + 5)).row(0)[:num_layers]
    assert draw_mask(flat, seed, stage, step, 100, one_rank(num_layers)).row(0) == longer


def test_masks_are_the_same_in_a_fresh_process_and_in_later_versions() -> None:
    expected = "0000010010101100"
    mask = draw_mask(LdsConfig(), 1234, 1, 3, 100, one_rank(16))
    assert "".join("01"[skip] for skip in mask.row(0)) == expected
    code = (
        "from megatron_sts.lds.mask import draw_mask; from megatron_sts.config.schema import LdsConfig;"
        "from megatron_sts.lds.placement import Placement;"
        "print(draw_mask(LdsConfig(), 1234, 1, 3, 100, Placement((0,) * 16, (0,) * 16, (0.0,), 0.0)).digest)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == mask.digest


def test_extreme_probabilities() -> None:
    everything = LdsConfig(alpha=1.0, epsilon=0.0, schedule="constant")
    nothing = LdsConfig(alpha=0.0)
    for step in range(50):
        assert draw_mask(everything, 0, 0, step, 50, one_rank(9)).num_skipped == 9
        assert draw_mask(nothing, 0, 0, step, 50, one_rank(9)).num_skipped == 0


def test_fixed_layers_are_skipped_in_every_step() -> None:
    lds = LdsConfig(sampler="fixed", fixed_layers=(0, 2))
    assert {draw_mask(lds, seed, 0, seed, 10, one_rank(3)).row(0) for seed in range(10)} == {(True, False, True)}


@given(st.integers(0, 5), st.integers(0, 5), st.lists(st.booleans(), max_size=5), st.data())
def test_digests_are_equal_exactly_when_masks_are(stage: int, step: int, bits: list[bool], data: st.DataObject) -> None:
    one = tuple(bits)
    mask = SkipMask(stage, step, (one,))
    other = SkipMask(
        data.draw(st.integers(stage, stage + 1)),
        data.draw(st.integers(step, step + 1)),
        data.draw(
            st.sampled_from([(one,), (one[::-1],), ((*one, False),), (one[:-1],), (one, one), (one[:1], one[1:])])
        ),
    )
    assert (mask.digest == other.digest) == (mask == other)
    assert len(mask.digest) == 16 and int(mask.digest, 16) >= 0


def test_mask_reads_by_layer_and_is_frozen() -> None:
    mask = SkipMask(0, 4, ((False, True, True),))
    assert mask.row(0) == mask.row(5) == (False, True, True) and mask.num_skipped == 2
    assert dense_mask(0, 4, 3) == SkipMask(0, 4, ((False, False, False),))
    with pytest.raises(dataclasses.FrozenInstanceError):
        mask.step = 5  # type: ignore[misc]


def test_mask_of_microbatches() -> None:
    mask = SkipMask(0, 4, ((False, True, True), (True, False, True)))
    assert [mask.row(microbatch) for microbatch in range(2)] == [(False, True, True), (True, False, True)]
    assert mask.idle == (False, False, True) and mask.num_layers == 3 and mask.num_skipped == 2
    with pytest.raises(IndexError):
        mask.row(2)


def test_gate_answers_for_the_microbatch_it_was_told() -> None:
    gate = SkipGate()
    gate.enter(1)  # evaluation has no mask
    assert not gate.skips(0)
    gate.set(SkipMask(0, 4, ((False, True), (True, False))), residual_scales=(2.0, 4.0))
    answers = []
    for microbatch in (1, 0):
        gate.enter(microbatch)
        answers.append([gate.skips(layer) for layer in range(2)])
    assert answers == [[True, False], [False, True]] and gate.residual_scale(1) == 4.0
    gate.clear()
    assert gate.residual_scale(1) == 1.0


def test_gate_answers_for_the_mask_it_holds() -> None:
    gate = SkipGate()
    assert not gate.skips(2)
    gate.set(SkipMask(0, 4, ((False, True, True),)))
    assert [gate.skips(layer) for layer in range(3)] == [False, True, True]
    gate.clear()
    assert not gate.skips(1)


def test_mask_that_runs_all_layers_first() -> None:
    per_step = SkipMask(stage=1, step=2, rows=((True, False, True),))
    assert per_step.running_all_first(3).rows == ((False,) * 3, *per_step.rows * 2)
    per_microbatch = SkipMask(stage=1, step=2, rows=((True, False), (True, True)))
    first = per_microbatch.running_all_first(2)
    assert (first.stage, first.step, first.rows) == (1, 2, ((False, False), (True, True)))
    assert per_step.running_all_first(1).idle == (False,) * 3


def test_gate_knows_whether_any_step_has_begun() -> None:
    gate = SkipGate()
    assert not gate.has_started
    gate.set(dense_mask(0, 0, 2))
    gate.clear()
    assert gate.has_started
