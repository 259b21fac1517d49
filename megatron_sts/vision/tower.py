"""The vision tower: pixels in, one feature vector a patch out. Knows nothing of language, tokens or compression."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from megatron_sts.config.architecture import HF_SIZES, VisionConfig
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.resolve import Resolved
from megatron_sts.data.fitting import Colour, Fitting
from megatron_sts.mcore.config import PARAMS_DTYPE
from megatron_sts.mcore.vision import build_encoder
from megatron_sts.vision.hugging_face import Replicated, make_config, make_model_for

Channels = tuple[float, float, float]
CHANNEL_STATISTICS: dict[str, tuple[Channels, Channels]] = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
"""Published mean and standard deviation by tower, for pixels in [0, 1] (preprocessing of openai/CLIP and of
google-research/big_vision)."""


class VisionTower(torch.nn.Module):
    """CLIP's or SigLIP's ViT: normalises pixels and runs the encoder to its feature layer.

    The class token is dropped, unless a Q-Former follows, which looks at it too.
    """

    def __init__(self, resolved: Resolved) -> None:
        super().__init__()
        model = resolved.config.model
        assert model.vision is not None
        self.encoder = build_encoder(resolved)
        self._statistics = channel_statistics(model.vision)
        self._num_dropped = self.encoder.class_token_len if model.qformer is None else 0

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """``pixels`` uint8 [n, 3, h, w] -> [n, patches, vision hidden]."""
        features = self.encoder(normalise(pixels, *self._statistics).to(self.encoder.conv1.weight.dtype))
        return features[:, self._num_dropped :]

    def sharded_state_dict(self, prefix: str = "", *args: Any, **options: Any) -> dict[str, Any]:
        """For checkpoints. A module without it is taken to hold the same tensors on all tensor-parallel ranks."""
        sharded: dict[str, Any] = self.encoder.sharded_state_dict(f"{prefix}encoder.", *args, **options)
        return sharded


class HuggingFaceTower(Replicated):
    """A ViT of ``transformers``. Tokens before the patches (class, registers) are dropped unless a Q-Former follows.

    Raises:
        ConfigError: the model does not give a token of the hidden size for each patch.
    """

    def __init__(self, resolved: Resolved) -> None:
        super().__init__()
        model, dtype = resolved.config.model, PARAMS_DTYPE[resolved.config.precision.params]
        vision = model.vision
        assert vision is not None
        self._vision = vision
        self._num_patches = (vision.image_size // vision.patch_size) ** 2
        self._drops = model.qformer is None
        pixels = torch.empty(1, 3, vision.image_size, vision.image_size, dtype=dtype, device="meta")
        config = hugging_face_config(vision, resolved.num_vision_layers)
        self.encoder = make_model_for(config, dtype, lambda encoder: self._read(encoder, pixels))
        self.train()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """``pixels`` uint8 [n, 3, h, w] -> [n, patches, vision hidden]."""
        dtype = next(self.encoder.parameters()).dtype
        features = self._read(self.encoder, normalise(pixels, *channel_statistics(self._vision)).to(dtype))
        return features[:, -self._num_patches :] if self._drops else features

    def _read(self, encoder: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        """The output of a model without layers after ``feature_layer``, or of its last layer."""
        if self._vision.feature_layer == -1:
            features: torch.Tensor = encoder(pixel_values=pixels).last_hidden_state
        else:
            features = encoder(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
        if features.shape[1] < self._num_patches or features.shape[2:] != (self._vision.hidden_size,):
            raise ConfigError(
                f"model.vision.hf_config.model_type={(self._vision.hf_config or {})['model_type']}: gives features {list(features.shape[1:])} "
                f"for {self._num_patches} patches of hidden size {self._vision.hidden_size}; use a plain ViT"
            )
        return features


def check_hugging_face_tower(resolved: Resolved) -> None:
    """Builds the tower without memory for it.

    Raises:
        ConfigError: ``transformers`` knows no such model, or it gives other features than the config says.
    """
    with torch.device("meta"):
        HuggingFaceTower(resolved)


def hugging_face_config(vision: VisionConfig, num_layers: int) -> Any:
    """The config of ``transformers`` for the first ``num_layers`` layers of an hf tower."""
    sizes = {name: getattr(vision, field) for field, name in HF_SIZES.items() if getattr(vision, field) is not None}
    options = {**(vision.hf_config or {}), **sizes, "num_hidden_layers": num_layers}
    # Else some models' last hidden state stands among those of layers, which has passed a norm.
    options["tie_last_hidden_states"] = False
    return make_config("model.vision.hf_config.model_type", **options)


def build_tower(resolved: Resolved) -> VisionTower | HuggingFaceTower:
    """The tower that the config names."""
    vision = resolved.config.model.vision
    assert vision is not None
    return HuggingFaceTower(resolved) if vision.tower == "hf" else VisionTower(resolved)


def normalise(pixels: torch.Tensor, mean: Channels, std: Channels) -> torch.Tensor:
    """``pixels`` uint8 [n, 3, h, w] -> fp32, with zero mean and unit deviation of channels with these statistics."""
    return (pixels.to(torch.float32) / 255.0 - _on(pixels.device, mean)) / _on(pixels.device, std)


def fitting_of(vision: VisionConfig) -> Fitting:
    """How pictures are fitted to the tower's square."""
    resample, colour = vision.resample or "bicubic", padding_colour(vision)
    return Fitting(vision.image_size, vision.processing or "pad", resample, colour, vision.tiles)


def padding_colour(vision: VisionConfig) -> Colour:
    """What pictures are padded with, as LLaVA-1.5 and its processor in transformers do: the mean, near 0 when normalised."""
    red, green, blue = (int(255 * mean) for mean in channel_statistics(vision)[0])
    return red, green, blue


def channel_statistics(vision: VisionConfig) -> tuple[Channels, Channels]:
    """Mean and standard deviation of pixels in [0, 1]: as configured, else the tower's published ones."""
    if vision.tower == "hf":
        assert vision.pixel_mean and vision.pixel_std  # no config without is accepted
        return vision.pixel_mean, vision.pixel_std
    mean, std = CHANNEL_STATISTICS[vision.tower]
    return vision.pixel_mean or mean, vision.pixel_std or std


@cache
def _on(device: torch.device, channels: Channels) -> torch.Tensor:
    """fp32 [3, 1, 1]. Not a buffer: those become bf16 with the model's weights."""
    return torch.tensor(channels, device=device).view(3, 1, 1)
