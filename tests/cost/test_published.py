"""The rules of ``cost`` on a model that this package does not build, with memory that others measured.

Megatron-LM's ``gpt3_7b_tp4_pp1_memory_speed`` (functional tests, golden values of eight H100s): GELU, LayerNorm and biases instead of SwiGLU and
RMSNorm, dropout of 0.1, learned positions, no RoPE, a cross entropy that is not fused, Transformer Engine, distributed optimizer.
"""

from __future__ import annotations

import pytest

HIDDEN, FFN, LAYERS, HEADS, GROUPS, CHANNELS, VOCAB, LENGTH = 4096, 16384, 32, 32, 8, 128, 131584, 8192
"""The vocabulary of 131,073 is padded to a multiple of 128 x 4."""
TP, DP, ROWS = 4, 2, 2
QKV = (HEADS + 2 * GROUPS) * CHANNELS
TOKENS = ROWS * LENGTH
HIDDEN_BYTES = 2 * TOKENS * HIDDEN
ALLOCATED_BYTES, PEAK_BYTES = 20.66e9, 57.14e9
ALLOCATED_RTOL, PEAK_RTOL = 0.01, 0.05
"""What the plans of this project are asked for. Measured: 0.005 below, and 0.004 below."""


def state_bytes() -> float:
    """2 bytes of weight, 4 of gradient, and 12 of master weight and moments on ``DP`` ranks."""
    matrices = (HIDDEN * QKV + HIDDEN * HIDDEN + 2 * HIDDEN * FFN) // TP
    biases_and_norms = QKV // TP + HIDDEN + FFN // TP + HIDDEN + 4 * HIDDEN
    ends = 2 * VOCAB * HIDDEN // TP + LENGTH * HIDDEN + 2 * HIDDEN
    return (LAYERS * (matrices + biases_and_norms) + ends) * (2 + 4 + 12 / DP)


def kept_bytes() -> int:
    """Without sequence parallelism. A layer: inputs and outputs of two norms, fused QKV, the attention's output, input and output of GELU,
    and two dropout masks of a byte an element; before and after them a mask, the final norm, and fp32 probabilities."""
    statistics = 2 * 8 * TOKENS + 4 * TOKENS * HEADS // TP
    attention = 2 * TOKENS * (QKV + HEADS * CHANNELS) // TP
    layer = 4 * HIDDEN_BYTES + statistics + attention + 2 * 2 * TOKENS * FFN // TP + 2 * TOKENS * HIDDEN
    ends = TOKENS * HIDDEN + 2 * HIDDEN_BYTES
    return LAYERS * layer + ends + 4 * TOKENS * VOCAB // TP


def test_state_is_what_was_allocated() -> None:
    assert state_bytes() == pytest.approx(ALLOCATED_BYTES, rel=ALLOCATED_RTOL)


def test_the_peak_is_state_and_activations_and_logits_beside_their_copy() -> None:
    logits = 2 * TOKENS * VOCAB // TP
    assert state_bytes() + kept_bytes() + logits == pytest.approx(PEAK_BYTES, rel=PEAK_RTOL)
