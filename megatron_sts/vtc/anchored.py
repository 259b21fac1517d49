"""Anchored selection, this project's own: compression that keeps writing. A grid, what looks like text, then relevance.

Instruction-guided selection reasons well and reads badly (arXiv 2509.18150, table 2): relevance drops the fine strokes that
no word of the instruction resembles. Here two shares of the kept tokens are anchored beforehand, whatever the instruction.
"""

from __future__ import annotations

from fractions import Fraction
from math import floor, isqrt

import torch

from megatron_sts.config.uniform import uniform_tokens
from megatron_sts.vtc.diversity import condition, greedy_map, quality_kernel
from megatron_sts.vtc.guided import relevance
from megatron_sts.vtc.seen import SeenImages
from megatron_sts.vtc.text_density import text_density

TEMPERATURE = 1.0
"""Of relevance, which runs from 0 to 1 in each image: the most relevant token has e^(1/T) times the least one's quality."""


class AnchoredSampler:
    """Keeps an even grid (``grid_share`` of k), text (``text_share``), and a relevant and diverse rest.

    Counts: shares of k rounded down, what is left is the rest's. The three never overlap: text is looked for beside the
    grid, and the rest is chosen given both, so that it adds what they do not show. Shares lie in [0, 1] and add up to at
    most 1; a share of 0 turns its part off.
    """

    def __init__(self, grid_share: float, text_share: float) -> None:
        self._shares = grid_share, text_share

    @torch.no_grad()
    def select(self, images: SeenImages, num_kept: int) -> torch.Tensor:
        """See ``LookingSampler``; the tokens must form a square grid."""
        visual = images.visual
        num_images, num_tokens_in, _ = visual.shape
        num_grid, num_text = (part(share, num_kept) for share in self._shares)
        taken = torch.zeros(num_images, num_tokens_in, dtype=torch.bool, device=visual.device)
        if num_grid:
            taken[:, list(uniform_tokens(num_tokens_in, num_grid))] = True
        if num_text:
            density = text_density(images.pixels, isqrt(num_tokens_in)).masked_fill(taken, -torch.inf)
            taken.scatter_(1, density.sort(dim=1, descending=True, stable=True).indices[:, :num_text], True)
        if num_rest := num_kept - num_grid - num_text:
            quality = (spread(relevance(images)) / TEMPERATURE).exp()
            taken.scatter_(1, diverse_tokens(visual, quality, taken, num_grid + num_text, num_rest), True)
        return chosen_tokens(taken, num_kept)


def part(share: float, num_kept: int) -> int:
    """share x num_kept, rounded down; the share as written (0.29 x 100 is 29)."""
    return floor(Fraction(str(share)) * num_kept)


def spread(scores: torch.Tensor) -> torch.Tensor:
    """``scores`` [n, t], each image's stretched over [0, 1]; equal ones become 1.

    Cosine similarities between image and word embeddings lie in a narrow band that differs from model to model.
    """
    low, high = scores.aminmax(dim=1, keepdim=True)
    return torch.where(high > low, (scores - low) / (high - low), 1.0)


def diverse_tokens(
    visual: torch.Tensor, quality: torch.Tensor, taken: torch.Tensor, num_taken: int, count: int
) -> torch.Tensor:
    """``count`` more tokens of each image, int64 [n, count], chosen given the ``num_taken`` of ``taken`` [n, t]."""
    kernel = quality_kernel(visual, quality)
    if num_taken:
        kernel = condition(kernel, chosen_tokens(taken, num_taken))
    return greedy_map(kernel, taken, count)


def chosen_tokens(taken: torch.Tensor, count: int) -> torch.Tensor:
    """Where ``taken`` [n, t] is True, ``count`` times in each row: int64 [n, count], ascending."""
    return taken.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :count]
