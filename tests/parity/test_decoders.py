"""Decoders beside plain Llama: Qwen2's biases of QKV and tied embeddings, Llama 3.1's RoPE scaling."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from megatron_sts.mcore.decoder import run_decoder
from tests.parity.hf import (
    FORWARD_RTOL,
    VOCAB,
    build_like,
    check_loss_and_gradients,
    composed_loss,
    hf_clip,
    hf_decoder,
    hf_projector,
    make_batch,
    relative,
    resolved_model,
    tower_features,
)

# Waves of the tiny model's 8 channels turn 6.4, 0.76, 0.09 and 0.01 times in 40 positions: kept, mixed, scaled, scaled.
SCALING = {"factor": 8.0, "low_freq_factor": 0.5, "high_freq_factor": 4.0, "original_max_position_embeddings": 40}


def qwen2(*, tied: bool) -> tuple[dict[str, Any], PreTrainedModel]:
    reference = hf_decoder(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=tied)
    return {"add_qkv_bias": True, "tie_word_embeddings": tied}, reference


def llama31() -> tuple[dict[str, Any], PreTrainedModel]:
    rope = {"rope_type": "llama3", "rope_theta": 5000.0, **SCALING}
    reference = hf_decoder(LlamaForCausalLM, LlamaConfig, rope_parameters=rope, max_position_embeddings=400)
    return {"rope_scaling": SCALING}, reference


DECODERS = {"qwen2": lambda: qwen2(tied=False), "qwen2 tied": lambda: qwen2(tied=True), "llama 3.1": llama31}


@pytest.mark.parametrize("name", DECODERS)
def test_logits_at_any_positions(one_rank: None, name: str) -> None:
    written, reference = DECODERS[name]()
    model = build_like(resolved_model(language=written), language=reference)
    tokens = torch.randint(0, VOCAB, (3, 50))
    starts, gaps = torch.tensor([[0], [3], [70]]), torch.randint(1, 4, (3, 50)).cumsum(1)
    with torch.no_grad():
        found = run_decoder(model.language, tokens, starts + gaps, None, None, None)
        expected = reference(tokens, position_ids=starts + gaps).logits
    difference = relative(found, expected)
    print(f"{difference:.1e}")
    assert difference <= FORWARD_RTOL


@pytest.mark.parametrize("name", DECODERS)
def test_loss_and_gradients_of_the_whole(one_rank: None, name: str) -> None:
    written, decoder = DECODERS[name]()
    references = {"vision": hf_clip(), "projector": hf_projector(), "language": decoder}
    resolved = resolved_model(feature_layer=-2, language=written)
    model = build_like(resolved, **references)
    batch = make_batch(resolved, [2, 0, 1, 3])
    visual = references["projector"](tower_features(references["vision"], batch.pixels, -2))
    check_loss_and_gradients(model, batch, composed_loss(visual, decoder, batch), references)


def test_scaling_matters(one_rank: None) -> None:
    """The parity above would not see a scaling that is left out on both sides."""
    _, reference = llama31()
    plain = build_like(resolved_model(), language=reference)
    tokens, positions = torch.randint(0, VOCAB, (1, 50)), torch.arange(50)[None]
    with torch.no_grad():
        found = run_decoder(plain.language, tokens, positions, None, None, None)
        expected = reference(tokens, position_ids=positions).logits
    assert relative(found, expected) > 100 * FORWARD_RTOL
