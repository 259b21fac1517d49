"""The ``kernels`` section of a config: which library computes what. Torch-free; knows nothing of what is installed."""

from __future__ import annotations

from typing import Literal

from megatron_sts.config.section import Section


class KernelsConfig(Section):
    """Where the kernels of the decoder and the optimizer come from; ``auto``: the fastest that this machine has."""

    layers: Literal["auto", "transformer-engine", "torch"] = "auto"
    """Linear layers, norms and attention of the decoder."""
    optimizer: Literal["auto", "transformer-engine", "apex", "torch"] = "auto"
    """Adam."""
    gradient_accumulation_fusion: bool | Literal["auto"] = "auto"
    """Weight gradients add to the fp32 buffer within the matrix product. Transformer Engine's layers can; torch's with
    apex's extension."""
    cuda_graphs: bool = False
