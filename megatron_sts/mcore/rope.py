"""Rotary frequencies that megatron-core's multi-axis RoPE has no option for."""

from __future__ import annotations

import math

import torch

from megatron_sts.config.architecture import RopeScalingConfig


def scaled_frequencies(frequencies: torch.Tensor, scaling: RopeScalingConfig) -> torch.Tensor:
    """Llama 3.1's RoPE scaling of the angles a position [channels / 2] (Llama 3 reference code, ``apply_scaling``).

    Waves that turn more often than ``high_freq_factor`` times in the original length stay, those that turn less often than
    ``low_freq_factor`` times become ``factor`` times longer, and in between both are mixed.
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(frequencies / scaling.factor, frequencies, kept.clamp(0, 1))
