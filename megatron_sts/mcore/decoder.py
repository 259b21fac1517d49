"""Builds one pipeline chunk of the language model: megatron-core's ``GPTModel`` with layers that can be skipped."""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_sts.config.resolve import Resolved
from megatron_sts.data.packing import Packing
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore.config import language_config
from megatron_sts.mcore.packing import attention_within
from megatron_sts.mcore.rope import scaled_frequencies
from megatron_sts.mcore.specs import decoder_spec


def build_decoder(
    resolved: Resolved, gate: SkipGate, *, pre_process: bool, post_process: bool, vp_stage: int | None
) -> GPTModel:
    """One chunk of the decoder; ``pre_process`` adds the embedding, ``post_process`` the final norm and head.

    Rotary angles come from each token's own position id, so that a compressed image's tokens can keep the positions they
    had: megatron-core's multi-axis RoPE with all of the head's channels on one axis, which is plain RoPE.
    """
    language = resolved.config.model.language
    config = language_config(resolved)
    decoder = GPTModel(
        config,
        decoder_spec(resolved, config, gate, vp_stage),
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
    decoder.rotary_pos_emb.cp_group = None  # or it would take this rank's share of what is its share already
    if language.rope_scaling is not None:
        rotary = decoder.rotary_pos_emb
        rotary.inv_freq = scaled_frequencies(rotary.inv_freq, language.rope_scaling)
    return decoder


def run_decoder(
    decoder: GPTModel,
    tokens: torch.Tensor,
    position_ids: torch.Tensor,
    packing: Packing | None,
    embeddings: torch.Tensor | None,
    labels: torch.Tensor | None,
) -> torch.Tensor:
    """``tokens``, ``position_ids``, ``labels`` [b, s] and, on the first stage, ``embeddings`` [s, b, h] of this context-parallel
    rank's s tokens of each row; ``packing`` of the whole rows [b, s x cp].

    Tokens attend to earlier ones of their own segment; without packing to all earlier ones of their row.
    Returns per-token losses [b, s] (with labels) or logits [b, s, vocab / tp] on the last stage, else hidden states [s, b, h].
    """
    output: torch.Tensor = decoder(
        input_ids=tokens,
        position_ids=position_ids.unsqueeze(0).expand(3, -1, -1),
        decoder_input=embeddings,
        labels=labels,
        **attention_within(packing, decoder.config),
    )
    return output
