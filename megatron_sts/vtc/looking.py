"""Samplers that look at the image, after the projector; the caller gives every rank the same choice."""

from __future__ import annotations

from typing import Protocol

import torch

from megatron_sts.config.schema import VtcConfig
from megatron_sts.vtc.anchored import AnchoredSampler
from megatron_sts.vtc.guided import GuidedSampler
from megatron_sts.vtc.seen import SeenImages


class LookingSampler(Protocol):
    """Chooses tokens by what they show.

    A pure function, on the device of its arguments, without gradient. Scores are fp32, equal ones go to the first token;
    but scores that differ by rounding alone may fall either way on another device, batch size or parallel layout. So one
    rank of a tensor-parallel group chooses, and the caller broadcasts its indices to whoever needs tokens or positions.
    """

    def select(self, images: SeenImages, num_kept: int) -> torch.Tensor:
        """Kept tokens of each image, int64 [n, num_kept], distinct and ascending; ``num_kept`` is 1 to t."""
        ...


def make_looking_sampler(vtc: VtcConfig) -> LookingSampler | None:
    """The sampler that a stage's config names; None for those that need not look, and for ``pooled``, which selects none."""
    if vtc.sampler == "guided":
        return GuidedSampler()
    if vtc.sampler == "anchored":
        return AnchoredSampler(vtc.grid_share, vtc.text_share)
    return None
