"""The one batch type that walks through training. Knows nothing of where samples come from."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from megatron_sts.cost.flops import TokenLoad
from megatron_sts.data.packing import Packing
from megatron_sts.data.records import SkippedSample


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Shapes: b rows, s tokens, n squares that the tower sees (images, views of images in tiles, frames) of t features
    each, p of these that are projected, v kept visual tokens of all images together; without tiles p = v.

    All fields are the same on every rank of a model copy, except that ``pixels`` and ``features`` are filled on the first stage only.
    """

    tokens: torch.Tensor
    """int64 [b, s]; an image is as many consecutive placeholder ids as it keeps tokens."""
    labels: torch.Tensor
    """int64 [b, s]: the token that should follow."""
    loss_mask: torch.Tensor
    """float32 [b, s]: 1 where the label counts."""
    position_ids: torch.Tensor
    """int64 [b, s]: RoPE positions, which start anew with each sample."""
    is_visual: torch.Tensor
    """bool [b, s]: where the placeholders are."""
    is_instruction: torch.Tensor
    """bool [b, s]: words of a user, which guide samplers that look."""
    segments: torch.Tensor
    """int32 [b, s]: which of the row's samples a token belongs to, from 1, its padding too; 0 is what follows the last."""
    packing: Packing | None
    """How samples that attend to themselves alone share rows; None where each has a row of its own."""
    visual_indices: torch.Tensor
    """int64 [p]: the kept tokens, as indices into the n x t features of all squares in reading order, ascending.

    A sampler that looks at images replaces them in the model; until then they are evenly spaced."""
    num_kept: tuple[int, ...]
    """Visual tokens that each image keeps."""
    num_placeholders: int
    """Of ``is_visual``, counted where no device is waited for."""
    pixels: torch.Tensor | None
    """uint8 [n, 3, h, w], in reading order. With ``parallel.vision: spread`` only where something looks at them in a pass."""
    num_samples: int
    """Those that were used."""
    num_truncated: int
    """Those of them whose end was left out."""
    num_tokens: int
    """Tokens that are not padding."""
    load: TokenLoad
    """What the model computes, padding included."""
    dense_load: TokenLoad
    """The same without VTC."""
    features: torch.Tensor | None = None
    """What the tower made of the squares before the step (``parallel.vision: spread``), on the first stage: [n, t, d], or [p, d] of the
    kept tokens alone where nothing that follows needs the others."""
    visual_sources: torch.Tensor | None = None
    """int64 [c, f], with tiles: which of the p each visual token but newlines is made of, in reading order; in one row all distinct."""
    visual_weights: torch.Tensor | None = None
    """float32 [c, f]: the sources' weights; None: c is 1, and each token its source."""
    is_newline: torch.Tensor | None = None
    """bool [v], with tiles."""
    number: int = 0
    """Of the micro-batch in its step."""
    skipped: tuple[SkippedSample, ...] = ()
    """Samples that could not be used; without packing their rows are padding."""

    @property
    def sequence_length(self) -> int:
        """Tokens of a row."""
        return self.tokens.shape[1]

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), torch.Tensor)
        }
        return replace(self, **moved, packing=None if self.packing is None else self.packing.to(device))
