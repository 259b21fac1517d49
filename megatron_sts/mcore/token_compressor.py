"""Visual token compression in a script of one's own on megatron-core: an encoder that gives the kept tokens only."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_sts.config.errors import refuse
from megatron_sts.config.schema import VtcConfig
from megatron_sts.config.tokens import kept_tokens
from megatron_sts.config.uniform import uniform_tokens
from megatron_sts.vtc.compressor import compress
from megatron_sts.vtc.positions import position_ids


class TokenCompressor:
    """Keeps the same evenly spaced tokens of every image.

    Build the vision encoder from ``encoder_spec(spec)``, give each image ``num_tokens_out`` placeholders, and the language model
    ``position_ids``. Projector and language model then compute what is kept only.

    Args:
        vtc: ``keep_ratio`` and ``positions``; the sampler is uniform.
        num_tokens_in: of an image, as the encoder gives them; a square number for a square grid.
        multiple: keeps a multiple of it, as FP8 and sequence parallelism may need, or all.

    Raises:
        ConfigError: other settings, or no token would be kept.
    """

    def __init__(self, vtc: VtcConfig, num_tokens_in: int, *, multiple: int = 1) -> None:
        if vtc != VtcConfig(keep_ratio=vtc.keep_ratio, positions=vtc.positions):
            refuse("vtc", repr(vtc), "only the uniform sampler works without our trainer", "set keep_ratio, positions")
        self.num_tokens_out = kept_tokens(vtc, vtc.keep_ratio, num_tokens_in, multiple)
        """Of each image."""
        if self.num_tokens_out < 1:
            refuse("vtc.keep_ratio", vtc.keep_ratio, f"keeps none of {num_tokens_in} tokens", "raise it")
        self._positions, self._num_tokens_in = vtc.positions, num_tokens_in
        self._kept = torch.tensor(uniform_tokens(num_tokens_in, self.num_tokens_out))

    def encoder_spec(self, spec: ModuleSpec) -> ModuleSpec:
        """Of the same encoder, with the same weights, that gives [images, num_tokens_out, hidden] of what ``spec``'s gives."""
        spec = copy(spec)
        name = f"Compressing{spec.module.__name__}"
        spec.module = type(name, (CompressingEncoder, spec.module), {})
        spec.params = {**spec.params, "num_tokens_in": self._num_tokens_in, "kept": self._kept}
        return spec

    def position_ids(self, tokens: torch.Tensor, image_token: int) -> torch.Tensor:
        """Positions of ``tokens`` [b, s], both on the host, in which ``image_token`` holds the place of each kept token.

        With ``positions: original`` those that text and kept tokens had among all tokens of the images; compact: 0, 1, 2, ...

        Raises:
            ValueError: a row's placeholders are not those of whole images.
        """
        rows = []
        for is_visual in tokens == image_token:
            kept = [self._kept] * (int(is_visual.sum()) // self.num_tokens_out)
            rows.append(position_ids(is_visual, kept, self._num_tokens_in, self._positions))
        return torch.stack(rows)


class CompressingEncoder(torch.nn.Module):
    """Comes before an encoder's class among the bases of the class that a spec then names."""

    def __init__(self, *args: Any, num_tokens_in: int, kept: torch.Tensor, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_tokens_in, self._kept = num_tokens_in, kept

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """What the encoder is given -> [images, num_tokens_out, hidden].

        Raises:
            ValueError: the encoder does not give ``num_tokens_in`` tokens an image.
        """
        features = super().forward(*args, **kwargs)
        num_images, num_tokens, _ = features.shape
        if num_tokens != self._num_tokens_in:
            raise ValueError(
                f"num_tokens_in={self._num_tokens_in}: the encoder gives {num_tokens} tokens an image; a class token must be left out"
            )
        starts = torch.arange(num_images).unsqueeze(1) * num_tokens
        return compress(features, (starts + self._kept).flatten()).view(num_images, len(self._kept), -1)
