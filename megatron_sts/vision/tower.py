"""The vision tower: pixels in, one feature vector a patch out. Knows nothing of language, tokens or compression."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from megatron_sts.config.architecture import VisionConfig
from megatron_sts.config.resolve import Resolved
from megatron_sts.mcore.vision import build_encoder

Channels = tuple[float, float, float]
CHANNEL_STATISTICS: dict[str, tuple[Channels, Channels]] = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Published mean and standard deviation by tower (preprocessing of openai/CLIP and google-research/big_vision), for pixels
in [0, 1]."""


class VisionTower(torch.nn.Module):
    """Normalises pixels, runs the encoder to its feature layer and drops the class token."""

    def __init__(self, resolved: Resolved) -> None:
        super().__init__()
        vision = resolved.config.model.vision
        assert vision is not None
        self.encoder = build_encoder(resolved)
        self._statistics = channel_statistics(vision)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """``pixels`` uint8 [n, 3, h, w] -> [n, patches, vision hidden]."""
        weight = self.encoder.conv1.weight
        mean, std = _on(pixels.device, *self._statistics)
        normalised = (pixels.to(torch.float32) / 255.0 - mean) / std
        features = self.encoder(normalised.to(weight.dtype))
        return features[:, self.encoder.class_token_len :]

    def sharded_state_dict(self, prefix: str = "", *args: Any, **options: Any) -> dict[str, Any]:
        """For checkpoints. A module without it is taken to hold the same tensors on all tensor-parallel ranks."""
        sharded: dict[str, Any] = self.encoder.sharded_state_dict(f"{prefix}encoder.", *args, **options)
        return sharded


def channel_statistics(vision: VisionConfig) -> tuple[Channels, Channels]:
    """Mean and standard deviation of pixels in [0, 1]: as configured, else the tower's published ones."""
    published = CHANNEL_STATISTICS.get(vision.tower)
    mean, std = vision.pixel_mean or (published and published[0]), vision.pixel_std or (published and published[1])
    assert mean and std  # checked: an hf tower's are given
    return mean, std


@cache
def _on(device: torch.device, *statistics: Channels) -> tuple[torch.Tensor, ...]:
    """Channel values, fp32 [3, 1, 1] each. Not buffers: those become bf16 with the model's weights."""
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in statistics)
