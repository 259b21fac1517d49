"""Position ids of a sequence whose images were compressed."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch


def position_ids(
    is_visual: torch.Tensor, indices: torch.Tensor, num_tokens_in: int, mode: Literal["original", "compact"]
) -> torch.Tensor:
    """RoPE positions of one compressed sample, int64 [s]; host tensors only.

    ``is_visual`` [s] bool marks placeholders, ``indices`` [num_images, k] the kept tokens of each image in sequence
    order; each image owns k consecutive placeholders, and images may be adjacent. compact: 0, 1, 2, ... original:
    the positions that the same tokens had before compression, when each image took num_tokens_in of them.
    """
    positions = np.arange(is_visual.numel())
    if mode == "original":
        kept = indices.numpy()
        num_kept = kept.shape[1]
        places = _placeholders(is_visual, indices)
        shift = np.zeros(positions.size + 1, dtype=np.int64)
        shift[places[:, :1] + num_kept] = num_tokens_in - num_kept
        positions += shift[:-1].cumsum()
        positions[places] += kept - np.arange(num_kept)
    return torch.from_numpy(positions)


def _placeholders(is_visual: torch.Tensor, indices: torch.Tensor) -> np.ndarray:
    """Where each image's placeholders are, [num_images, k]; refuses counts and gaps that do not fit ``indices``."""
    (num_images, num_kept), visual = indices.shape, np.flatnonzero(is_visual.numpy())
    if visual.size != num_images * num_kept:
        raise ValueError(f"{visual.size} visual placeholders, but {num_images} images x {num_kept} kept tokens")
    places = visual.reshape(num_images, num_kept)
    if (places[:, -1:] - places[:, :1] >= num_kept).any():
        raise ValueError(f"text inside an image: its {num_kept} placeholders must be consecutive")
    return places
