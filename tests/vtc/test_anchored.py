"""Anchored selection: its three shares, each alone and together, against what each should pick."""

import numpy as np
import pytest
import torch
from hypothesis import given

from megatron_sts.config.uniform import uniform_tokens
from megatron_sts.vtc.anchored import AnchoredSampler, part, spread
from megatron_sts.vtc.diversity import greedy_map, quality_kernel
from megatron_sts.vtc.guided import relevance
from megatron_sts.vtc.text_density import text_density
from tests.vtc.images import draw_images, seeds, shares, sizes


@given(sizes, seeds)
def test_only_a_grid_is_uniform(size: tuple[int, int], seed: int) -> None:
    side, num_kept = size
    kept = AnchoredSampler(1.0, 0.0).select(draw_images(side, seed), num_kept)
    assert kept.tolist() == [list(uniform_tokens(side * side, num_kept))] * 3


@given(sizes, seeds)
def test_only_text_is_the_densest_patches(size: tuple[int, int], seed: int) -> None:
    side, num_kept = size
    images = draw_images(side, seed)
    kept = AnchoredSampler(0.0, 1.0).select(images, num_kept)
    density = text_density(images.pixels, side).numpy()
    for row in range(3):
        assert set(kept[row].tolist()) == set(np.argsort(-density[row], kind="stable")[:num_kept].tolist())


@given(sizes, seeds)
def test_only_the_rest_is_the_greedy_dpp(size: tuple[int, int], seed: int) -> None:
    side, num_kept = size
    images = draw_images(side, seed)
    score = relevance(images)
    low, high = score.amin(1, keepdim=True), score.amax(1, keepdim=True)
    quality = torch.exp((score - low) / (high - low)).nan_to_num(nan=np.e)
    nothing = torch.zeros(3, side * side, dtype=torch.bool)
    expected = greedy_map(quality_kernel(images.visual, quality), nothing, num_kept).sort(dim=1).values
    assert torch.equal(AnchoredSampler(0.0, 0.0).select(images, num_kept), expected)


@given(sizes, seeds, shares)
def test_the_anchors_are_there_whatever_the_instruction(
    size: tuple[int, int], seed: int, pair: tuple[float, float]
) -> None:
    side, num_kept = size
    images = draw_images(side, seed)
    num_grid, num_text = (int(round(10 * share) * num_kept // 10) for share in pair)
    grid = set(uniform_tokens(side * side, num_grid)) if num_grid else set()
    kept = AnchoredSampler(*pair).select(images, num_kept)
    for density, row in zip(text_density(images.pixels, side).tolist(), kept.tolist(), strict=True):
        beside_grid = sorted((token for token in range(side * side) if token not in grid), key=lambda j: -density[j])
        assert set(row) >= grid | set(beside_grid[:num_text])


def test_the_instruction_moves_the_rest() -> None:
    images = draw_images(8, 0, num_words=1)
    images.mask[:] = True
    wanted = 37
    images.instruction[:, 0] = images.visual[:, wanted]
    assert wanted not in uniform_tokens(64, 4)
    assert (AnchoredSampler(0.5, 0.0).select(images, 8) == wanted).any(1).all()


def test_of_equal_patches_the_first_are_text() -> None:
    images = draw_images(4, 0)
    images.pixels[:] = 255
    assert AnchoredSampler(0.0, 1.0).select(images, 3).tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize(("share", "num_kept", "count"), [(0.29, 100, 29), (0.3, 9, 2), (0.7, 10, 7), (1.0, 5, 5)])
def test_shares_are_rounded_down_as_written(share: float, num_kept: int, count: int) -> None:
    assert part(share, num_kept) == count


def test_spread_reaches_from_zero_to_one() -> None:
    scores = torch.tensor([[0.2, 0.3, 0.25], [0.4, 0.4, 0.4]])
    torch.testing.assert_close(spread(scores), torch.tensor([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0]]))
