"""Position ids of a sequence whose images were compressed."""

from __future__ import annotations

from typing import Literal

import torch


def position_ids(
    is_visual: torch.Tensor, indices: torch.Tensor, num_tokens_in: int, mode: Literal["original", "compact"]
) -> torch.Tensor:
    """RoPE positions of one compressed sample, [s].

    ``is_visual`` [s] bool marks placeholders, ``indices`` [num_images, k] the kept tokens of each image in sequence
    order; each image owns k consecutive placeholders, and images may be adjacent. compact: 0, 1, 2, ... original:
    the positions of the same tokens before compression, num_tokens_in a whole image:
    position = text before + whole images before * num_tokens_in (+ indices[image, j] for the image's token j).
    """
    places = torch.arange(is_visual.numel(), device=is_visual.device)
    if mode == "compact":
        return places
    visual_before = is_visual.cumsum(0) - is_visual.long()
    _check_images(is_visual, visual_before, indices)
    whole_images_before = visual_before // max(indices.shape[1], 1)
    positions = places - visual_before + whole_images_before * num_tokens_in
    positions[is_visual] += indices.to(is_visual.device).reshape(-1)
    return positions


def _check_images(is_visual: torch.Tensor, visual_before: torch.Tensor, indices: torch.Tensor) -> None:
    """Refuses sequences in which images and placeholders do not match. Reads values: meant for host tensors."""
    num_placeholders = int(is_visual.sum())
    if num_placeholders != indices.numel():
        raise ValueError(
            f"{num_placeholders} visual placeholders, but {indices.shape[0]} images x {indices.shape[1]} kept tokens"
        )
    if num_placeholders and (visual_before[~is_visual] % indices.shape[1]).any():
        raise ValueError(f"text inside an image: its {indices.shape[1]} placeholders must be consecutive")
