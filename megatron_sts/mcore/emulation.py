"""Emulated FP8: megatron-core's parallel linears with torchao's matrix product in place of theirs.

Operands are rounded to FP8 and multiplied in the run's own format, so that any device shows what FP8 does to a loss. The
collectives around the product, the weights and their names stay. Scales are those of a rank's shard, never of the whole.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args

from megatron_sts.config.precision import PrecisionConfig
from megatron_sts.mcore.fp8 import LeavesFp8


class EmulatedProduct:
    """``x @ weight.T`` and its gradients with operands in FP8; micro-batches of fewer than ``min_tokens`` as they are."""

    def __init__(self, precision: PrecisionConfig) -> None:
        self.min_tokens = precision.min_tokens_for_fp8
        self._config = float8_config(precision.emulated_scaling, precision.format)
        self._gemms = Float8Linear(16, 16, bias=False, device="meta", config=self._config).linear_mm_config

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """``x`` [..., k], ``weight`` [n, k] -> [..., n]."""
        if x.shape[:-1].numel() < self.min_tokens:
            return torch.nn.functional.linear(x, weight)
        product: torch.Tensor = matmul_with_hp_or_float8_args.apply(x, weight.t(), self._gemms, self._config)
        return product


def float8_config(scaling: Literal["tensorwise", "rowwise"], fp8_format: str) -> Float8LinearConfig:
    """torchao's settings: current scaling; E4M3 forward, and for gradients E5M2 (hybrid) or E4M3 (e4m3)."""
    recipe = Float8LinearConfig.from_recipe_name(scaling)
    of_gradients = torch.float8_e5m2 if fp8_format == "hybrid" else torch.float8_e4m3fn
    cast = dataclasses.replace(recipe.cast_config_grad_output, target_dtype=of_gradients)
    return dataclasses.replace(
        recipe, emulate=True, cast_config_grad_output=cast, cast_config_grad_output_for_grad_weight=cast
    )


class _Emulated(LeavesFp8):
    """What both kinds of linear share: the product, with the communication that megatron-core's own would do, which is all its own
    where it leaves FP8."""

    emulated: EmulatedProduct

    def _forward_impl(
        self,
        input: torch.Tensor,
        weight: torch.Tensor,
        *,
        bias: torch.Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: Any,
        **others: Any,
    ) -> torch.Tensor:
        if self.leaves_fp8:
            plain: torch.Tensor = super()._forward_impl(  # type: ignore[misc]
                input,
                weight,
                bias=bias,
                allreduce_dgrad=allreduce_dgrad,
                sequence_parallel=sequence_parallel,
                tp_group=tp_group,
                **others,
            )
            return plain
        if sequence_parallel:
            input = gather_from_sequence_parallel_region(input, tensor_parallel_output_grad=True, group=tp_group)
        elif allreduce_dgrad:
            input = copy_to_tensor_model_parallel_region(input, group=tp_group)
        product = self.emulated(input, weight)
        return product if bias is None else product + bias


class EmulatedColumnParallelLinear(_Emulated, ColumnParallelLinear):
    """Outputs split over tensor-parallel ranks."""

    def __init__(self, *args: Any, emulated: EmulatedProduct, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.emulated = emulated


class EmulatedRowParallelLinear(_Emulated, RowParallelLinear):
    """Inputs split over tensor-parallel ranks."""

    def __init__(self, *args: Any, emulated: EmulatedProduct, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.emulated = emulated
