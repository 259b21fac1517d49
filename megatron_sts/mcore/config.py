"""Our config -> megatron-core's ``TransformerConfig`` for the decoder, the vision tower and the projector."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sts.config.precision import PrecisionConfig
from megatron_sts.config.resolve import Resolved
from megatron_sts.config.schema import RunConfig
from megatron_sts.runtime.device import current_device
from megatron_sts.runtime.kernels import ENGINE
from megatron_sts.runtime.probe import kernels_for

PARAMS_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's activation: x * sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    """SigLIP's activation: GELU by its approximation with tanh."""
    return F.gelu(x, approximate="tanh")


def _common(resolved: Resolved) -> dict[str, Any]:
    parallel, precision = resolved.config.parallel, resolved.config.precision
    dtype = PARAMS_DTYPE[precision.params]
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "params_dtype": dtype,
        "bf16": dtype is torch.bfloat16,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "calculate_per_token_loss": True,
        "gradient_accumulation_fusion": kernels_for(resolved.config).gradient_accumulation_fusion != "off",
        "use_cpu_initialization": not current_device().is_cuda,
    }


def language_config(resolved: Resolved) -> TransformerConfig:
    """The decoder: RMSNorm, SwiGLU, no biases but those of QKV, the run's tensor, pipeline, sequence and context parallelism."""
    language, parallel, precision = resolved.config.model.language, resolved.config.parallel, resolved.config.precision
    interleaved = parallel.virtual_pipeline_model_parallel_size is not None
    settings = _common(resolved) | _kernel_settings(resolved.config) | _fp8_settings(precision)
    if parallel.recompute == "selective":  # full: the layer's own
        settings["recompute_granularity"] = "selective"
    return TransformerConfig(
        **settings,
        num_layers=language.num_layers,
        hidden_size=language.hidden_size,
        num_attention_heads=language.num_attention_heads,
        num_query_groups=language.num_query_groups,
        kv_channels=language.kv_channels,
        ffn_hidden_size=language.ffn_hidden_size,
        normalization="RMSNorm",
        layernorm_epsilon=language.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=language.add_qkv_bias,
        init_method_std=language.init_std,
        embedding_init_method_std=language.embedding_init_std,
        mrope_section=[_head_width(resolved) // 2, 0, 0],
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_layout=_pipeline_layout(resolved),
        pipeline_dtype=PARAMS_DTYPE[precision.params],
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.context_parallel_size,
        overlap_p2p_comm=interleaved and parallel.overlap_p2p_comm,
        batch_p2p_comm=not (interleaved and parallel.overlap_p2p_comm),
        deallocate_pipeline_outputs=True,
    )


def _kernel_settings(config: RunConfig) -> dict[str, Any]:
    kernels = kernels_for(config)
    return {
        "transformer_impl": "transformer_engine" if kernels.linear == ENGINE else "local",
        "use_te_activation_func": True,  # or rather: the layer spec's, which is ``torch_ops.SwiGlu``
        "cross_entropy_loss_fusion": kernels.cross_entropy == "megatron-core, fused",
    }


def _fp8_settings(precision: PrecisionConfig) -> dict[str, Any]:
    """Of Transformer Engine's recipes; emulation is in the layer spec."""
    if precision.engine_recipe is None:
        return {}
    count = precision.first_last_layers_bf16
    return {
        "fp8": precision.format,
        "fp8_recipe": precision.engine_recipe,
        "fp8_param": precision.fp8_params,
        "fp8_amax_history_len": precision.amax_history_len,
        "fp8_amax_compute_algo": precision.amax_compute_algo,
        "first_last_layers_bf16": count > 0,
        "num_layers_at_start_in_bf16": count,
        "num_layers_at_end_in_bf16": count,
    }


def _pipeline_layout(resolved: Resolved) -> list[list[str]]:
    """What each chunk holds, in the order in which data pass."""
    chunks = [["decoder"] * count for of_ranks in resolved.layers_per_chunk for count in of_ranks]
    chunks[0].insert(0, "embedding")
    chunks[-1].append("loss")
    return chunks


def _head_width(resolved: Resolved) -> int:
    language = resolved.config.model.language
    return language.kv_channels or language.hidden_size // language.num_attention_heads


def vision_config(resolved: Resolved) -> TransformerConfig:
    """The ViT: LayerNorm, biases, its tower's GELU; tensor-parallel with the decoder, unless it is spread: then whole on each rank."""
    vision = resolved.config.model.vision
    assert vision is not None
    activation, epsilon = {"clip": (quick_gelu, 1e-5), "siglip": (tanh_gelu, 1e-6)}[vision.tower]
    whole = {"tensor_model_parallel_size": 1} if resolved.spreads_vision else {}
    return TransformerConfig(
        **(_common(resolved) | whole),
        num_layers=resolved.num_vision_layers,
        hidden_size=vision.hidden_size,
        num_attention_heads=vision.num_attention_heads,
        ffn_hidden_size=vision.ffn_hidden_size or 4 * vision.hidden_size,
        normalization="LayerNorm",
        layernorm_epsilon=vision.norm_epsilon or epsilon,
        gated_linear_unit=False,
        activation_func=activation,
        add_bias_linear=True,
        add_qkv_bias=True,
    )


def projector_config(resolved: Resolved) -> TransformerConfig:
    """One linear layer, or two with GELU between (LLaVA-1.5's mlp2x_gelu, both of the decoder's width), with biases."""
    language = resolved.config.model.language
    return TransformerConfig(
        **_common(resolved),
        num_layers=1,
        hidden_size=language.hidden_size,
        num_attention_heads=resolved.config.parallel.tensor_model_parallel_size,  # has none; must divide
        ffn_hidden_size=language.hidden_size,
        activation_func=F.gelu,
        gated_linear_unit=False,
        add_bias_linear=True,
        init_method_std=language.init_std,
    )
