"""Instruction-guided selection against a float64 NumPy loop, its ties and its fallback."""

import numpy as np
import pytest
import torch
from hypothesis import given

from megatron_sts.config.uniform import uniform_tokens
from megatron_sts.vtc.guided import GuidedSampler, relevance, top_tokens
from megatron_sts.vtc.seen import SeenImages
from tests.vtc.images import draw_images, seeds, sizes


def plain_relevance(images: SeenImages, row: int) -> np.ndarray:
    """Largest cosine similarity of each token with a word, one pair at a time."""
    tokens = images.visual[row].double().numpy()
    words = images.instruction[row][images.mask[row]].double().numpy()
    scores = [
        max(token @ word / (np.linalg.norm(token) * np.linalg.norm(word)) for word in words) if len(words) else 1.0
        for token in tokens
    ]
    return np.array(scores)


@given(sizes, seeds)
def test_guided_equals_a_plain_loop(size: tuple[int, int], seed: int) -> None:
    side, num_kept = size
    images = draw_images(side, seed)
    kept = GuidedSampler().select(images, num_kept)
    scores = relevance(images)
    for row in range(3):
        expected = plain_relevance(images, row)
        # fp32 sums of 64 products of size <= 1, twice normalised: some 1e-7 each.
        np.testing.assert_allclose(scores[row].numpy(), expected, atol=2e-6)
        if images.mask[row].any():
            # Not the indices: two of 49 random scores lie closer than fp32 can tell apart now and then.
            lowest_kept = np.sort(expected)[side * side - num_kept]
            assert (expected[kept[row].numpy()] >= lowest_kept - 4e-6).all()
        else:
            assert tuple(kept[row].tolist()) == uniform_tokens(side * side, num_kept)


def test_what_lies_under_the_mask_does_not_matter() -> None:
    images = draw_images(6, 3)
    images.instruction[~images.mask] = torch.nan
    changed = GuidedSampler().select(images, 9)
    assert torch.equal(changed, GuidedSampler().select(draw_images(6, 3), 9))


def test_without_any_word_slot_selection_is_uniform() -> None:
    images = draw_images(6, 0, num_words=0)
    assert GuidedSampler().select(images, 9).tolist() == [list(uniform_tokens(36, 9))] * 3


def test_a_token_named_by_one_word_of_many_is_kept() -> None:
    images = draw_images(6, 0, num_words=40)
    images.mask[:] = True
    images.instruction[:, 17] = 7 * images.visual[:, 30]
    assert (GuidedSampler().select(images, 1) == 30).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_of_equal_scores_the_first_tokens_are_kept_on_cuda_too() -> None:
    # Only there is a sort that need not be stable not stable.
    scores = (torch.arange(2880, device="cuda") % 3).float().expand(4, -1)
    assert torch.equal(top_tokens(scores, 700).cpu(), torch.arange(2, 2100, 3).repeat(4, 1))


def test_of_equal_scores_the_first_tokens_are_kept() -> None:
    scores = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    assert top_tokens(scores, 2).tolist() == [[1, 3], [0, 1]]
    assert top_tokens(scores, 4).tolist() == [[0, 1, 3, 4], [0, 1, 2, 3]]
