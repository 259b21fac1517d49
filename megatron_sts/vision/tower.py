"""The vision tower: pixels in, one feature vector a patch out. Knows nothing of language, tokens or compression."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from megatron_sts.config.resolve import Resolved
from megatron_sts.mcore.vision import build_clip_encoder

# CLIP's published channel statistics (openai/CLIP preprocessing), for pixels in [0, 1].
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class VisionTower(torch.nn.Module):
    """Normalises pixels, runs the encoder to its feature layer and drops the class token."""

    def __init__(self, resolved: Resolved) -> None:
        super().__init__()
        self.encoder = build_clip_encoder(resolved)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """``pixels`` uint8 [n, 3, h, w] -> [n, patches, vision hidden]."""
        weight = self.encoder.conv1.weight
        mean, std = _channel_statistics(pixels.device)
        normalised = (pixels.to(torch.float32) / 255.0 - mean) / std
        features = self.encoder(normalised.to(weight.dtype))
        return features[:, self.encoder.class_token_len :]

    def sharded_state_dict(self, prefix: str = "", *args: Any, **options: Any) -> dict[str, Any]:
        """For checkpoints. A module without it is taken to hold the same tensors on all tensor-parallel ranks."""
        sharded: dict[str, Any] = self.encoder.sharded_state_dict(f"{prefix}encoder.", *args, **options)
        return sharded


@cache
def _channel_statistics(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation, fp32 [3, 1, 1] each. Not buffers: those become bf16 with the model's weights."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return mean, std
