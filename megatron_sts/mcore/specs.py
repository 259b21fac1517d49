"""Which modules a transformer layer is made of: Transformer Engine's, torch's, or torch's with emulated FP8."""

from __future__ import annotations

from functools import partial
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.parallel_state import get_pipeline_model_parallel_rank
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_sts.config.resolve import Resolved
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore.attention import AllGatherAttention, SdpaCoreAttention
from megatron_sts.mcore.fp8 import able_to_leave
from megatron_sts.mcore.layer import SkippableTransformerLayer, TorchNorm
from megatron_sts.mcore.torch_ops import SwiGlu, TorchSelfAttention
from megatron_sts.runtime.kernels import ENGINE
from megatron_sts.runtime.probe import kernels_for

Linears = tuple[Any, Any]
"""What builds a linear layer with split outputs, and one with split inputs."""
PLAIN: Linears = (ColumnParallelLinear, RowParallelLinear)


def torch_layer_spec(
    attn_mask_type: AttnMaskType,
    module: type[TransformerLayer] = TransformerLayer,
    attention: type[SelfAttention] = SelfAttention,
    activation: type[SwiGlu] | None = None,
    linears: Linears = PLAIN,
    core_attention: type[SdpaCoreAttention] = SdpaCoreAttention,
) -> ModuleSpec:
    """A transformer layer of megatron-core's own parallel linears, torch's norm and torch's attention."""
    column, row = linears
    return ModuleSpec(
        module=module,
        submodules=TransformerLayerSubmodules(
            input_layernorm=TorchNorm,
            self_attention=ModuleSpec(
                module=attention,
                params={"attn_mask_type": attn_mask_type},
                submodules=SelfAttentionSubmodules(linear_qkv=column, core_attention=core_attention, linear_proj=row),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=TorchNorm,
            mlp=ModuleSpec(
                module=MLP, submodules=MLPSubmodules(linear_fc1=column, activation_func=activation, linear_fc2=row)
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def decoder_spec(
    resolved: Resolved, config: TransformerConfig, gate: SkipGate, vp_stage: int | None
) -> TransformerBlockSubmodules | ModuleSpec:
    """The layers of one chunk of the decoder, each of which can be skipped."""
    precision = resolved.config.precision
    params = {"gate": gate, "recompute": resolved.config.parallel.recompute == "full"}
    params |= {"min_tokens_for_fp8": precision.min_tokens_for_fp8}
    if kernels_for(resolved.config).linear == ENGINE:
        return engine_layer_spec(params, leaves_fp8=precision.fp8_where == "auto")
    first = get_transformer_layer_offset(config, vp_stage)
    count = get_num_layers_to_build(config, vp_stage, get_pipeline_model_parallel_rank())
    emulated = _emulated_linears(resolved) if precision.fp8 == "emulate" else PLAIN
    core_attention = SdpaCoreAttention if config.context_parallel_size == 1 else AllGatherAttention
    specs = []
    for layer in range(first, first + count):
        is_outer = min(layer, config.num_layers - 1 - layer) < precision.first_last_layers_bf16
        linears = PLAIN if is_outer else emulated
        spec = torch_layer_spec(
            AttnMaskType.causal, SkippableTransformerLayer, TorchSelfAttention, SwiGlu, linears, core_attention
        )
        spec.params = params
        specs.append(spec)
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=TorchNorm)


def engine_layer_spec(params: dict[str, Any], *, leaves_fp8: bool = False) -> ModuleSpec:
    """A layer of Transformer Engine's linears, norms and attention, that can be skipped.

    RoPE and SwiGLU are those of the torch layers: megatron-core's fused RoPE knows one position for all rows, and its eager
    versions launch twice as many kernels. ``leaves_fp8``: each linear can leave FP8 on its own (``fp8.leave_fp8``).
    """
    spec = get_gpt_layer_with_transformer_engine_spec()
    spec.module = SkippableTransformerLayer
    spec.params = {**spec.params, **params}
    attention, mlp = spec.submodules.self_attention, spec.submodules.mlp.keywords["submodules"]
    attention.module = TorchSelfAttention
    mlp.activation_func = SwiGlu
    if leaves_fp8:
        for owner, name in ((attention.submodules, "linear_qkv"), (attention.submodules, "linear_proj"),
                            (mlp, "linear_fc1"), (mlp, "linear_fc2")):  # fmt: skip
            setattr(owner, name, able_to_leave(getattr(owner, name)))
    return spec


def _emulated_linears(resolved: Resolved) -> Linears:
    from megatron_sts.mcore import emulation  # torchao takes seconds to import, and may be absent

    emulated = emulation.EmulatedProduct(resolved.config.precision)
    return (
        partial(emulation.EmulatedColumnParallelLinear, emulated=emulated),
        partial(emulation.EmulatedRowParallelLinear, emulated=emulated),
    )
