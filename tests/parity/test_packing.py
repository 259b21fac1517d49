"""Packed rows against transformers, which gets each sample in a row of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_sts.data.collate import collate
from megatron_sts.data.packing import describe_packing
from megatron_sts.mcore.packing import hidden_pairs, packed_seq_params
from tests.parity.hf import (
    NUM_KEPT,
    NUM_PATCHES,
    build_like,
    check_loss_and_gradients,
    composed_loss,
    hf_clip,
    hf_llama,
    hf_projector,
    make_sample,
    resolved_model,
    tower_features,
)

ROWS = [[[1, 0, 2], [0, 0, 0, 1]], [[3], [0, 1]], [[0]]]
"""Images of each sample of each row."""


@pytest.mark.parametrize("num_images", ROWS, ids=["two rows", "one sample a row", "text only"])
@pytest.mark.parametrize("kept", [NUM_PATCHES, NUM_KEPT], ids=["dense", "compressed"])
def test_loss_and_gradients_of_packed_rows(one_rank: None, num_images: list[list[int]], kept: int) -> None:
    references = {"vision": hf_clip(), "projector": hf_projector(), "language": hf_llama()}
    resolved = resolved_model(feature_layer=-2, keep_ratio=kept / NUM_PATCHES)
    random = np.random.default_rng(3)
    rows = [[make_sample(random, count, kept) for count in row] for row in num_images]
    length = max(sum(sample.length for sample in row) for row in rows) + 5
    packed = collate(rows, sequence_length=length, dense_length=None, pad_id=0, packed=True)
    apart = collate([[sample] for row in rows for sample in row],
                    sequence_length=length, dense_length=None, pad_id=0, packed=False)  # fmt: skip
    assert packed.num_tokens == apart.num_tokens and packed.loss_mask.sum() == apart.loss_mask.sum()

    model = build_like(resolved, **references)
    visual = None
    if apart.pixels is not None:
        visual = references["projector"](tower_features(references["vision"], apart.pixels, -2))
    check_loss_and_gradients(model, packed, composed_loss(visual, references["language"], apart), references)


def test_load_counts_pairs_within_samples_only() -> None:
    random = np.random.default_rng(3)
    rows = [[make_sample(random, 1, NUM_KEPT), make_sample(random, 2, NUM_KEPT)], []]
    batch = collate(rows, sequence_length=80, dense_length=None, pad_id=0, packed=True)
    first, second = (sample.length for sample in rows[0])
    dropped = NUM_PATCHES - NUM_KEPT
    rest = 80 - first - second
    assert (batch.load.num_tokens, batch.load.num_images, batch.load.num_visual_tokens) == (160, 3, 3 * NUM_KEPT)
    assert batch.load.num_pairs == first**2 + second**2 + rest**2 + 80**2
    assert batch.dense_load.num_tokens == 160 + 3 * dropped
    assert batch.dense_load.num_visual_tokens == 3 * NUM_PATCHES
    assert batch.dense_load.num_pairs == (first + dropped) ** 2 + (second + 2 * dropped) ** 2 + rest**2 + 80**2


def test_attention_stays_within_segments() -> None:
    segments = torch.tensor([[1, 1, 2, 2, 2, 0]], dtype=torch.int32)
    packing = describe_packing(segments)
    visible = ~hidden_pairs(packing)[0, 0]
    expected = [[segments[0, q] == segments[0, k] and k <= q for k in range(6)] for q in range(6)]
    assert visible.tolist() == expected
    params = packed_seq_params(packing)
    assert params.cu_seqlens_q.tolist() == [0, 2, 5, 6] and params.max_seqlen_q == 3
    alone = packed_seq_params(describe_packing(torch.ones(1, 4, dtype=torch.int32)))
    assert alone.cu_seqlens_q.tolist() == [0, 4] and alone.max_seqlen_q == 4
