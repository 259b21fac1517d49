"""Position ids of a sequence whose images were compressed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch


def position_ids(
    is_visual: torch.Tensor,
    indices: Sequence[torch.Tensor],
    num_tokens_in: int | Sequence[int],
    mode: Literal["original", "compact"],
) -> torch.Tensor:
    """RoPE positions of one compressed sample, int64 [s]; host tensors only.

    ``is_visual`` [s] bool marks placeholders, ``indices`` holds the kept tokens of each image, int64 [k], in sequence
    order; each image owns k consecutive placeholders, and images may be adjacent. compact: 0, 1, 2, ... original: the
    positions that the same tokens had before compression, when each image took num_tokens_in of them (one number, or one an image).

    Raises:
        ValueError: the placeholders are not those of these images.
    """
    positions, places = np.arange(is_visual.numel()), np.flatnonzero(is_visual.numpy())
    num_kept = [len(kept) for kept in indices]
    if places.size != sum(num_kept):
        raise ValueError(f"{places.size} visual placeholders, but {len(num_kept)} images keep {sum(num_kept)} tokens")
    end = 0
    counts_in = [num_tokens_in] * len(indices) if isinstance(num_tokens_in, int) else num_tokens_in
    for kept, count, count_in in zip(indices, num_kept, counts_in, strict=True):
        mine, end = places[end : end + count], end + count
        if mine[-1] - mine[0] >= count:
            raise ValueError(f"text inside an image: its {count} placeholders must be consecutive")
        if mode == "original":
            positions[mine] = positions[mine[0]] + kept.numpy()
            positions[mine[-1] + 1 :] += count_in - count
    return torch.from_numpy(positions)
