"""Samplers: what every sampler promises, purity and fairness of random."""

from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sts.config.schema import VtcConfig
from megatron_sts.vtc.samplers import RandomSampler, Sampler, UniformSampler, make_sampler

FALSE_ALARM = 1e-6
"""Chance that a statistical test below fails although the sampler is right (Bonferroni over its comparisons)."""

token_counts = st.integers(1, 150).flatmap(lambda t: st.tuples(st.just(t), st.integers(1, t)))
samplers = st.sampled_from([UniformSampler(), RandomSampler(3, 1)])
image_keys = st.tuples(st.integers(0, 2**40), st.integers(0, 20))


@given(samplers, st.lists(image_keys, max_size=4), token_counts)
def test_indices_are_distinct_ascending_and_in_range(
    sampler: Sampler, keys: list[tuple[int, int]], counts: tuple[int, int]
) -> None:
    indices = sampler.indices(keys, *counts)
    assert indices.dtype == torch.int64 and indices.shape == (len(keys), counts[1])
    assert (indices.diff(dim=1) > 0).all() and (indices >= 0).all() and (indices < counts[0]).all()


@given(samplers, st.lists(image_keys, min_size=1, max_size=4), token_counts)
def test_indices_are_the_callers(sampler: Sampler, keys: list[tuple[int, int]], counts: tuple[int, int]) -> None:
    """What a caller writes into them is in no later ones, nor in another image's."""
    indices = sampler.indices(keys, *counts)
    before = indices.clone()
    indices[0] += 1
    assert torch.equal(indices[1:], before[1:]) and torch.equal(sampler.indices(keys, *counts), before)


@given(samplers, st.integers(1, 150))
def test_keeping_all_is_the_identity(sampler: Sampler, num_tokens: int) -> None:
    assert sampler.indices([(0, 0)], num_tokens, num_tokens)[0].tolist() == list(range(num_tokens))


@pytest.mark.parametrize("sampler", [UniformSampler(), RandomSampler(3, 1)])
@pytest.mark.parametrize("num_kept", [0, 10])
def test_impossible_counts_are_refused(sampler: Sampler, num_kept: int) -> None:
    with pytest.raises(ValueError, match=f"cannot keep {num_kept} of 9 visual tokens"):
        sampler.indices([(0, 0)], 9, num_kept)


@given(st.lists(image_keys, min_size=1, max_size=5, unique=True), token_counts, st.randoms(use_true_random=False))
def test_random_depends_on_the_key_only(keys: list[tuple[int, int]], counts: tuple[int, int], random: object) -> None:
    batch = RandomSampler(3, 1).indices(keys, *counts)
    order = list(range(len(keys)))
    random.shuffle(order)  # type: ignore[attr-defined]
    alone = torch.cat([RandomSampler(3, 1).indices([keys[i]], *counts) for i in order])
    assert torch.equal(alone, batch[order])


def test_random_differs_by_seed_stage_sample_and_image() -> None:
    rows = [
        RandomSampler(seed, stage).indices([key], 64, 32)[0].tolist()
        for seed, stage, key in [(0, 0, (0, 0)), (1, 0, (0, 0)), (0, 1, (0, 0)), (0, 0, (1, 0)), (0, 0, (0, 1))]
    ]
    assert len({tuple(row) for row in rows}) == len(rows)


def test_random_is_the_same_in_later_versions() -> None:
    assert RandomSampler(1234, 1).indices([(7, 0)], 16, 6).tolist() == [[3, 6, 7, 9, 12, 14]]


def test_random_keeps_every_token_and_pair_equally_often() -> None:
    # 20,000 images of 16 tokens, 6 kept: P(token) = 6/16, P(two given tokens) = 6*5/(16*15).
    num_images, num_in, num_out = 20_000, 16, 6
    indices = RandomSampler(3, 1).indices([(i, 0) for i in range(num_images)], num_in, num_out)
    kept = torch.zeros(num_images, num_in).scatter_(1, indices, 1.0).numpy()
    both = (kept.T @ kept)[np.triu_indices(num_in, 1)] / num_images
    observed = np.concatenate([kept.mean(0), both])
    expected = np.concatenate([np.full(num_in, 6 / 16), np.full(both.size, 30 / 240)])
    z = (observed - expected) / np.sqrt(expected * (1 - expected) / num_images)
    assert np.abs(z).max() < NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * z.size))


def test_make_sampler_follows_the_config() -> None:
    assert isinstance(make_sampler(VtcConfig(sampler="uniform"), 3, 1), UniformSampler)
    random = make_sampler(VtcConfig(sampler="random"), 3, 1)
    expected = RandomSampler(3, 1).indices([(5, 2)], 64, 32)
    assert torch.equal(random.indices([(5, 2)], 64, 32), expected)
