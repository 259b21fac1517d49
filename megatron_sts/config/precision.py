"""The ``precision`` section of a config: number formats. Torch-free; knows nothing of what a device can do."""

from __future__ import annotations

from typing import Literal

from megatron_sts.config.section import NonNegativeInt, PositiveInt, Section

Fp8 = Literal["off", "tensorwise", "delayed", "blockwise", "mxfp8", "emulate"]
Product = Literal["qkv", "proj", "fc1", "fc2"]
"""A matrix product of a decoder layer: queries, keys and values; attention's output; the first and the second matrix of the MLP."""
PRODUCTS: tuple[Product, ...] = ("qkv", "proj", "fc1", "fc2")
"""All of them, in the order in which they run."""


class PrecisionConfig(Section):
    """Number formats of parameters, and of the matrix products in the decoder's layers."""

    params: Literal["fp32", "bf16"] = "fp32"
    """Of weights and activations. bf16: the optimizer keeps fp32 ones."""
    fp8: Fp8 = "off"
    """tensorwise, delayed, blockwise, mxfp8: Transformer Engine's recipes. tensorwise is the one to take with LDS: it keeps
    nothing from step to step. emulate: rounds to FP8 and multiplies in ``params``; shows what FP8 does to a loss, anywhere.
    """
    fp8_format: Literal["hybrid", "e4m3"] | None = None
    """hybrid: E4M3 forward, E5M2 for gradients; e4m3: E4M3 for all. None: hybrid, and e4m3 with blockwise, mxfp8 and
    rowwise emulation, which scale finely enough."""
    first_last_layers_bf16: NonNegativeInt = 0
    """So many decoder layers next to the input, and as many next to the output, multiply in ``params``."""
    min_tokens_for_fp8: NonNegativeInt = 0
    """Decoder layers multiply in ``params`` when a micro-batch of one rank has fewer tokens: FP8 is slower there."""
    fp8_where: Literal["all", "auto"] = "all"
    """Which of a decoder layer's four products (qkv, proj, fc1, fc2) multiply in FP8. auto: in each stage those that leave the
    layer faster so than in ``params``, as ``plan`` models it on ``fp8_hardware`` (a model: unmeasured). ``config.resolved.yaml``
    lists the others as ``bf16_products``. With emulate they are those of tensorwise scaling in bf16.
    """
    fp8_hardware: str = "h100"
    """auto: whose rates decide, on whatever machine the run is: a preset of ``plan --hardware``, or a file of its form with
    rates of your own."""
    fp8_params: bool = False
    """Keep the decoder's weights in FP8 only; needs the distributed optimizer, which has the fp32 ones."""
    amax_history_len: PositiveInt = 1024
    """delayed: micro-batches whose largest values decide a scale."""
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    """delayed: which of these values does."""
    emulated_scaling: Literal["tensorwise", "rowwise"] = "tensorwise"
    """emulate: one scale a tensor, or one (a power of two) a row or column."""

    @property
    def engine_recipe(self) -> str | None:
        """The recipe that Transformer Engine runs; None where it runs none."""
        return None if self.fp8 in ("off", "emulate") else self.fp8

    @property
    def format(self) -> str:
        """``fp8_format``, or its default for the recipe."""
        is_fine = self.fp8 in ("blockwise", "mxfp8") or (self.fp8 == "emulate" and self.emulated_scaling == "rowwise")
        return self.fp8_format or ("e4m3" if is_fine else "hybrid")
