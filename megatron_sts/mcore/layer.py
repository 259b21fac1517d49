"""The decoder layer that can be skipped, and the torch-native norm it is built from when Transformer Engine is absent."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.recompute import te_checkpoint
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore.attention import check_spans_context
from megatron_sts.mcore.fp8 import fp8_unless_few


class SkippableTransformerLayer(TransformerLayer):
    """A ``TransformerLayer`` that is the identity on the residual stream, forward and backward, when ``gate`` says so.

    Name it in a layer spec with ``params={"gate": gate, "recompute": ...}``. A skipped call launches nothing and saves
    nothing. ``recompute`` saves the layer's input alone and runs the layer again in the backward pass, as megatron-core's
    ``recompute_granularity="full"`` does, but within the layer: the gate is asked once, in the forward pass.
    """

    def __init__(
        self, *args: Any, gate: SkipGate, recompute: bool = False, min_tokens_for_fp8: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        check_spans_context(self.self_attention.core_attention, self.config)
        self.gate = gate
        self.recompute = recompute
        self.min_tokens_for_fp8 = min_tokens_for_fp8
        for parameter in self.parameters():
            # Lets buckets and optimizer find what a skipped layer owns, after any wrapping and sharding.
            parameter.decoder_layer = self.layer

    @property
    def layer(self) -> int:
        """0-based index in the whole decoder (megatron counts from 1)."""
        return self.layer_number - 1

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``hidden_states`` [s, b, h] -> ([s, b, h], cross-attention context)."""
        if self.gate.skips(self.layer):
            return hidden_states, kwargs.get("context")
        self.gate.num_runs[self.layer] += 1
        run = partial(super().forward, **kwargs)
        with fp8_unless_few(self.config, self._num_tokens(hidden_states), self.min_tokens_for_fp8):
            output, context = (
                self._recomputed(run, hidden_states) if self.recompute and self.training else run(hidden_states)
            )
        scale = self.gate.residual_scale(self.layer)
        return output if scale == 1 else torch.lerp(hidden_states, output, scale), context

    def _num_tokens(self, hidden_states: torch.Tensor) -> int:
        """Rows of the layer's matrix products: under sequence parallelism the shards of all tensor-parallel ranks."""
        shards = self.config.tensor_model_parallel_size if self.config.sequence_parallel else 1
        return hidden_states.shape[0] * hidden_states.shape[1] * shards

    def _recomputed(self, run: Callable[..., Any], hidden_states: torch.Tensor) -> Any:
        if self.config.fp8:
            tracker = tensor_parallel.random.get_cuda_rng_tracker
            return te_checkpoint(run, False, tracker, self.pg_collection.tp, hidden_states)
        return tensor_parallel.checkpoint(run, False, hidden_states)


@cache
def skippable(module: type[TransformerLayer]) -> type[SkippableTransformerLayer]:
    """The same layer, which can be skipped: the class that a spec names in its place."""
    if issubclass(module, SkippableTransformerLayer):
        return module
    if module is TransformerLayer:
        return SkippableTransformerLayer
    return type(f"Skippable{module.__name__}", (SkippableTransformerLayer, module), {})


class TorchNorm:
    """LayerNorm or RMSNorm of torch, usable under sequence parallelism.

    A class, because megatron-core builds only classes; what comes out is torch's own module. The mark tells megatron-core to
    sum the gradient over tensor-parallel ranks, each of which saw a slice of the sequence.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> torch.nn.Module:  # type: ignore[misc]
        norm_class = torch.nn.RMSNorm if config.normalization == "RMSNorm" else torch.nn.LayerNorm
        norm = norm_class(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm
