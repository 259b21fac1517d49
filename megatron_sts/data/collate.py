"""Encoded samples become one padded ``Batch`` of the stage's static shape. Knows no source and no template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_sts.data.batch import Batch
from megatron_sts.data.template import EncodedSample


@dataclass(frozen=True)
class PreparedSample:
    """An encoded sample with its images decoded (on ranks that use pixels), its kept tokens and its positions."""

    encoded: EncodedSample
    position_ids: torch.Tensor
    """int64 [t]."""
    visual_indices: torch.Tensor
    """int64 [num_images, k]."""
    pixels: tuple[np.ndarray, ...] | None
    """uint8 [h, w, 3] each; None on ranks that use none."""
    is_bad: bool = False
    """Keeps its tokens (shapes must agree on all ranks) but none carries loss."""


def collate(
    samples: Sequence[PreparedSample | None], sequence_length: int, pad_id: int, tokens_per_image: int
) -> Batch:
    """Right-pads to [b, sequence_length]; a None row is padding only. All tensors on the CPU."""
    shape = (len(samples), sequence_length)
    tokens = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, pad_id, dtype=torch.int64)
    loss_mask = torch.zeros(shape, dtype=torch.float32)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    is_visual = torch.zeros(shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        if sample is None:
            continue
        ids = torch.tensor(sample.encoded.tokens, dtype=torch.int64)
        length = len(ids)
        tokens[row, :length] = ids
        labels[row, : length - 1] = ids[1:]
        if not sample.is_bad:
            loss_mask[row, : length - 1] = torch.tensor(sample.encoded.is_target[1:], dtype=torch.float32)
        position_ids[row, :length] = sample.position_ids
        is_visual[row, :length] = torch.tensor(sample.encoded.is_visual)
    present = [sample for sample in samples if sample is not None]
    return Batch(
        tokens=tokens,
        labels=labels,
        loss_mask=loss_mask,
        position_ids=position_ids,
        is_visual=is_visual,
        visual_indices=torch.cat(
            [torch.empty(0, tokens_per_image, dtype=torch.int64), *(sample.visual_indices for sample in present)]
        ),
        pixels=_stack_pixels(present),
        num_tokens=sum(len(sample.encoded.tokens) for sample in present),
    )


def _stack_pixels(samples: Sequence[PreparedSample]) -> torch.Tensor | None:
    images = [image for sample in samples for image in sample.pixels or ()]
    if not images:
        return None
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
