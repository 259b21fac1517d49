"""The greedy DPP against a plain loop over determinants."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sts.vtc.diversity import RIDGE, condition, greedy_map, quality_kernel
from tests.vtc.images import seeds

SLACK = 1e-3
"""Nats by which a greedy step may miss the best log det: fp32 rounding (1e-6) beside the ridge (1e-3)."""


def draw(seed: int, num_tokens: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    visual = torch.randn(2, num_tokens, width, generator=generator)
    return visual, torch.rand(2, num_tokens, generator=generator).exp()


def plain_kernel(visual: np.ndarray, quality: np.ndarray) -> np.ndarray:
    """q_i cos_ij q_j + ridge, one pair at a time, float64."""
    unit = [x / np.linalg.norm(x) for x in visual.astype(np.float64)]
    rows = [[q * (a @ b + RIDGE * (a is b)) * p for b, p in zip(unit, quality, strict=True)]
            for a, q in zip(unit, quality, strict=True)]  # fmt: skip
    return np.array(rows)


def log_det(kernel: np.ndarray, chosen: list[int]) -> float:
    return float(np.linalg.slogdet(kernel[np.ix_(chosen, chosen)])[1]) if chosen else 0.0


@given(seeds, st.integers(0, 4), st.integers(1, 6), st.integers(2, 16))
def test_each_pick_raises_the_determinant_most(seed: int, num_anchors: int, count: int, width: int) -> None:
    num_tokens = 10
    visual, quality = draw(seed, num_tokens, width)
    anchors = torch.stack([torch.arange(num_anchors), torch.arange(num_tokens - num_anchors, num_tokens)])
    taken = torch.zeros(2, num_tokens, dtype=torch.bool).scatter_(1, anchors, True)
    kernel = quality_kernel(visual, quality)
    picks = greedy_map(condition(kernel, anchors) if num_anchors else kernel, taken, count)
    for row in range(2):
        plain = plain_kernel(visual[row].numpy(), quality[row].double().numpy())
        np.testing.assert_allclose(kernel[row].numpy(), plain, atol=1e-5)
        chosen = anchors[row].tolist()
        for pick in picks[row].tolist():
            assert pick not in chosen
            gains = [log_det(plain, [*chosen, token]) for token in range(num_tokens) if token not in chosen]
            chosen.append(pick)
            assert log_det(plain, chosen) >= max(gains) - SLACK * len(chosen)


def test_a_copy_of_a_chosen_token_comes_last() -> None:
    visual = torch.eye(4)[[0, 0, 1, 2, 3]].unsqueeze(0)
    kernel = quality_kernel(visual, torch.ones(1, 5))
    nothing = torch.zeros(1, 5, dtype=torch.bool)
    assert greedy_map(kernel, nothing, 5).tolist() == [[0, 2, 3, 4, 1]]


def test_quality_comes_before_order() -> None:
    visual = torch.eye(4).unsqueeze(0)
    kernel = quality_kernel(visual, torch.tensor([[1.0, 3.0, 2.0, 4.0]]))
    assert greedy_map(kernel, torch.zeros(1, 4, dtype=torch.bool), 4).tolist() == [[3, 1, 2, 0]]


def test_identical_tokens_are_still_chosen_once_each() -> None:
    kernel = quality_kernel(torch.ones(1, 6, 3), torch.ones(1, 6))
    assert sorted(greedy_map(kernel, torch.zeros(1, 6, dtype=torch.bool), 6)[0].tolist()) == list(range(6))
