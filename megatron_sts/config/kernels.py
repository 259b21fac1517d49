"""The ``kernels`` section of a config: which library computes what. Torch-free; knows nothing of what is installed."""

from __future__ import annotations

from typing import Literal

from megatron_sts.config.section import Section


class KernelsConfig(Section):
    """Where the kernels of the decoder and the optimizer come from; ``auto``: the fastest that this machine has."""

    layers: Literal["auto", "transformer-engine", "torch"] = "auto"
    """Linear layers, norms and attention of the decoder."""
    optimizer: Literal["auto", "transformer-engine", "apex", "torch"] = "auto"
    """Of Adam."""
    gradient_accumulation_fusion: bool | Literal["auto"] = "auto"
    """Add weight gradients to their fp32 buffer within the matrix product; needs apex's extension for it."""
    cuda_graphs: bool = False
    """Not supported yet, and never with LDS: a graph replays the same layers in every step."""
