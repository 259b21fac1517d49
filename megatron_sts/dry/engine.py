"""What Transformer Engine's layers keep and send instead of torch's, as a table: they cannot run here.

In bf16 its fused layers save what torch's do: a norm its input and fp32 deviations, attention q, k, v, its output and fp32 log-sum-exp, a matrix
its input. Those that multiply in FP8:

==================== ================================================================================================
linear_qkv, fc1, fc2 keep their input in FP8, 1 byte an element, transposed for the weight gradient
linear_proj          keeps its input as it is, which attention keeps anyway (``save_original_input``)
all                  keep two FP8 copies of their weight from the first micro-batch on, as it is and transposed; none more than
                     their 2 bytes a weight with ``precision.fp8_params``
sequence parallelism gathers their inputs and the gradients of their outputs in FP8; what is reduced stays in bf16
==================== ================================================================================================

Attention over n context-parallel ranks hands a rank's keys and values on n - 1 times in a forward pass, and in a backward pass these
and their gradients (``cp_comm_type`` p2p), where torch's gathers those of all ranks and reduce-scatters the gradients: ``RING``. What it keeps for
the backward pass is in ``ring.py``.

Scales, and blocks' scales, are left out. Source: Transformer Engine 2.x, ``module/layernorm_linear.py``, ``linear.py``,
``attention/dot_product_attention/context_parallel.py``, and megatron-core's
``extensions/transformer_engine.py``; peaks of an H200 with tensorwise scaling agree (``tests/dry/test_against_h200.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_sts.config.precision import PRODUCTS
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.mcore.attention import AllGatherAttention
from megatron_sts.mcore.layer import SkippableTransformerLayer

Kernels = Literal["torch", "engine"]
"""Whose layers the decoder is taken to have."""
FP8 = torch.float8_e4m3fn
"""Any format of one byte."""
KEEP_IN_FP8 = ("linear_qkv", "linear_fc1", "linear_fc2")
RING = {"all_gather": 1, "reduce_scatter": 2}
"""Tensors, each as large as a rank's own share, that go round where torch's attention does this: keys and values; these and their
gradients."""


@dataclass(frozen=True)
class Fp8Linears:
    """The matrices of a chunk that multiply in FP8."""

    modules: frozenset[torch.nn.Module]
    copies: tuple[torch.Tensor, ...]
    """What is kept of their weights besides the weights."""

    @property
    def copies_bytes(self) -> int:
        """Of all of them."""
        return sum(copy.nbytes for copy in self.copies)


def fp8_linears(model: torch.nn.Module, resolved: Resolved, spec: ResolvedStage, step: int) -> Fp8Linears:
    """Those of the decoder's layers that the run does not leave in bf16, for micro-batches of ``step``."""
    precision, num_layers = resolved.config.precision, resolved.config.model.language.num_layers
    num_tokens = spec.config.batch.micro_batch_size * spec.tokens(step).sequence_length
    num_tokens //= resolved.config.parallel.context_parallel_size
    if precision.engine_recipe is None or num_tokens < precision.min_tokens_for_fp8:
        return Fp8Linears(frozenset(), ())
    names = tuple(f"linear_{product}" for product in PRODUCTS if product not in spec.bf16_products)
    modules = frozenset(_linears(model, names, precision.first_last_layers_bf16, num_layers))
    weights = [module.get_parameter("weight") for module in modules if not precision.fp8_params]
    return Fp8Linears(modules, tuple(torch.empty(2, *w.shape, dtype=FP8, device=w.device) for w in weights))


def ring_attentions(model: torch.nn.Module) -> frozenset[torch.nn.Module]:
    """The core attentions of a chunk that span context-parallel ranks."""
    return frozenset(module for module in model.modules() if isinstance(module, AllGatherAttention))


def _linears(
    model: torch.nn.Module, names: tuple[str, ...], num_outer: int, num_layers: int
) -> Iterator[torch.nn.Module]:
    for layer in model.modules():
        if isinstance(layer, SkippableTransformerLayer) and min(layer.layer, num_layers - 1 - layer.layer) >= num_outer:
            yield from (module for name, module in layer.named_modules() if name.endswith(names))
