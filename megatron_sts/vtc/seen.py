"""What a sampler sees that looks at images before it chooses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SeenImages:
    """n images with t tokens each, and what is asked about them."""

    visual: torch.Tensor
    """Projected tokens [n, t, h], row-major on the image's grid."""
    pixels: torch.Tensor
    """What they show, uint8 [n, 3, height, width]."""
    instruction: torch.Tensor
    """Embeddings of the words of each image's instruction [n, q, h]; q may be 0."""
    mask: torch.Tensor
    """bool [n, q], True at words; a row may have none."""

    def rows(self, rows: Sequence[int]) -> SeenImages:
        """Only these images, in this order."""
        rows = list(rows)
        return SeenImages(self.visual[rows], self.pixels[rows], self.instruction[rows], self.mask[rows])
