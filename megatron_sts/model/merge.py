"""Puts projected visual tokens where the placeholders are."""

from __future__ import annotations

import torch


def merge_visual(
    embeddings: torch.Tensor, visual: torch.Tensor, is_visual: torch.Tensor, num_placeholders: int
) -> torch.Tensor:
    """Replaces placeholder embeddings by visual ones, in reading order.

    Args:
        embeddings: text embeddings [s, b, h].
        visual: projected, compressed visual tokens [v, h].
        is_visual: bool [b, s], True at placeholders.
        num_placeholders: how often; a device would have to be waited for to count them here.

    Raises:
        ValueError: the numbers of placeholders and visual tokens differ.
    """
    if num_placeholders != len(visual):
        raise ValueError(f"{num_placeholders} visual placeholders but {len(visual)} visual tokens in this micro-batch")
    batch_first = embeddings.transpose(0, 1)
    merged = batch_first.masked_scatter(is_visual.unsqueeze(-1), visual.to(embeddings.dtype))
    return merged.transpose(0, 1).contiguous()
