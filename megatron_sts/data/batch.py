"""The one batch type that walks through training. Knows nothing of where samples come from."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from megatron_sts.data.records import SkippedSample


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Shapes: b samples, s tokens, n images, k kept visual tokens an image.

    ``tokens``, ``labels``, ``loss_mask`` and ``position_ids`` are the same on every rank of a pipeline; ``pixels`` is filled
    on the first stage only.
    """

    tokens: torch.Tensor
    """int64 [b, s]; an image is k consecutive placeholder ids."""
    labels: torch.Tensor
    """int64 [b, s]: the token that should follow."""
    loss_mask: torch.Tensor
    """float32 [b, s]: 1 where the label counts."""
    position_ids: torch.Tensor
    """int64 [b, s]: RoPE positions."""
    is_visual: torch.Tensor
    """bool [b, s]: where the placeholders are."""
    visual_indices: torch.Tensor
    """int64 [n, k]: which of an image's tokens are kept, ascending."""
    pixels: torch.Tensor | None
    """uint8 [n, 3, h, w], images in reading order."""
    num_tokens: int
    """Tokens that are not padding."""
    skipped: tuple[SkippedSample, ...] = ()
    """Samples that could not be used; their rows are padding, or carry no loss."""

    @property
    def num_images(self) -> int:
        return self.visual_indices.shape[0]

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved)
