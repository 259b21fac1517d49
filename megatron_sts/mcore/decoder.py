"""Builds one pipeline chunk of the language model: megatron-core's ``GPTModel`` with layers that can be skipped."""

from __future__ import annotations

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.parallel_state import get_pipeline_model_parallel_rank
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_sts.config.resolve import Resolved
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore.config import language_config
from megatron_sts.mcore.layer import SdpaCoreAttention, SkippableTransformerLayer, TorchNorm, has_transformer_engine
from megatron_sts.mcore.packing import attention_within, check_packing
from megatron_sts.mcore.rope import scaled_frequencies
from megatron_sts.mcore.torch_ops import SwiGlu, TorchSelfAttention


def torch_layer_spec(
    attn_mask_type: AttnMaskType,
    module: type[TransformerLayer] = TransformerLayer,
    attention: type[SelfAttention] = SelfAttention,
    activation: type[SwiGlu] | None = None,
) -> ModuleSpec:
    """A transformer layer of megatron-core's own parallel linears, torch's norm and torch's attention."""
    return ModuleSpec(
        module=module,
        submodules=TransformerLayerSubmodules(
            input_layernorm=TorchNorm,
            self_attention=ModuleSpec(
                module=attention,
                params={"attn_mask_type": attn_mask_type},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=SdpaCoreAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=TorchNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, activation_func=activation, linear_fc2=RowParallelLinear
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def skippable_layer_spec(gate: SkipGate, *, recompute: bool) -> ModuleSpec:
    """The decoder layer: Transformer Engine's modules where they can run, else torch's; skippable either way."""
    if has_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec()
        spec.module = SkippableTransformerLayer
    else:
        spec = torch_layer_spec(AttnMaskType.causal, SkippableTransformerLayer, TorchSelfAttention, SwiGlu)
    spec.params = {**spec.params, "gate": gate, "recompute": recompute}
    return spec


def _block_spec(
    config: TransformerConfig, gate: SkipGate, vp_stage: int | None, *, recompute: bool
) -> TransformerBlockSubmodules | ModuleSpec:
    layer_spec = skippable_layer_spec(gate, recompute=recompute)
    if has_transformer_engine():
        return layer_spec
    num_layers = get_num_layers_to_build(config, vp_stage, get_pipeline_model_parallel_rank())
    return TransformerBlockSubmodules(layer_specs=[layer_spec] * num_layers, layer_norm=TorchNorm)


def build_decoder(
    resolved: Resolved, gate: SkipGate, *, pre_process: bool, post_process: bool, vp_stage: int | None
) -> GPTModel:
    """One chunk of the decoder; ``pre_process`` adds the embedding, ``post_process`` the final norm and head.

    Rotary angles come from each token's own position id, so that a compressed image's tokens can keep the positions they
    had: megatron-core's multi-axis RoPE with all of the head's channels on one axis, which is plain RoPE.
    """
    check_packing(resolved)
    language = resolved.config.model.language
    config = language_config(resolved)
    decoder = GPTModel(
        config,
        _block_spec(config, gate, vp_stage, recompute=resolved.config.parallel.recompute == "full"),
        vocab_size=language.vocab_size,
        max_sequence_length=max(stage.uncompressed.sequence_length for stage in resolved.stages),
        pre_process=pre_process,
        post_process=post_process,
        position_embedding_type="mrope",
        rotary_base=language.rotary_base,
        share_embeddings_and_output_weights=language.tie_word_embeddings,
        scatter_embedding_sequence_parallel=False,
        vp_stage=vp_stage,
    )
    if language.rope_scaling is not None:
        rotary = decoder.rotary_pos_emb
        rotary.inv_freq = scaled_frequencies(rotary.inv_freq, language.rope_scaling)
    return decoder


def run_decoder(
    decoder: GPTModel,
    tokens: torch.Tensor,
    position_ids: torch.Tensor,
    segments: torch.Tensor | None,
    embeddings: torch.Tensor | None,
    labels: torch.Tensor | None,
) -> torch.Tensor:
    """``tokens``, ``position_ids``, ``segments``, ``labels`` [b, s]; ``embeddings`` [s, b, h] on the first stage.

    Tokens attend to earlier ones of their own segment; with ``segments`` None to all earlier ones of their row.
    Returns per-token losses [b, s] (with labels) or logits [b, s, vocab / tp] on the last stage, else hidden states [s, b, h].
    """
    output = decoder(
        input_ids=tokens,
        position_ids=position_ids.unsqueeze(0).expand(3, -1, -1),
        decoder_input=embeddings,
        labels=labels,
        **attention_within(segments),
    )
    # With every layer of a middle stage skipped the output is the received tensor itself, which the schedule would free.
    return output.clone() if output is decoder.decoder.input_tensor else output
