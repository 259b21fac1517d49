"""The model computes what Hugging Face's CLIP, Llama and LLaVA compute: features, logits, the loss and its gradients."""

from __future__ import annotations

import pytest
import torch

from megatron_sts.mcore.decoder import run_decoder
from tests.parity.hf import (
    FORWARD_RTOL,
    IMAGE,
    NUM_KEPT,
    NUM_PATCHES,
    VOCAB,
    build_like,
    check_loss_and_gradients,
    composed_loss,
    hf_clip,
    hf_llama,
    hf_projector,
    make_batch,
    relative,
    resolved_model,
    tower_features,
)


def test_llama_logits_with_grouped_queries_and_any_positions(one_rank: None) -> None:
    reference = hf_llama()
    model = build_like(resolved_model(), language=reference)
    tokens = torch.randint(0, VOCAB, (3, 50))
    starts, gaps = torch.tensor([[0], [3], [70]]), torch.randint(1, 4, (3, 50)).cumsum(1)
    with torch.no_grad():
        found = run_decoder(model.language, tokens, starts + gaps, None, None, None)
        expected = reference(tokens, position_ids=starts + gaps).logits
    difference = relative(found, expected)
    print(f"{difference:.1e}")
    assert difference <= FORWARD_RTOL


@pytest.mark.parametrize("feature_layer", [-1, -2, -3])
def test_clip_features(one_rank: None, feature_layer: int) -> None:
    reference = hf_clip()
    model = build_like(resolved_model(feature_layer), vision=reference)
    pixels = torch.randint(0, 256, (5, 3, IMAGE, IMAGE), dtype=torch.uint8)
    with torch.no_grad():
        found, expected = model.vision(pixels), tower_features(reference, pixels, feature_layer)
    difference = relative(found, expected)
    print(f"{difference:.1e}")
    assert difference <= FORWARD_RTOL


@pytest.mark.parametrize(
    "num_images", [[2, 0, 1, 3], [0, 0, 1, 0], [0, 0], [3]], ids=["mixed", "one image", "text only", "one sample"]
)
@pytest.mark.parametrize("keep_ratio", [1.0, NUM_KEPT / NUM_PATCHES], ids=["dense", "compressed"])
def test_loss_and_gradients_of_the_whole(one_rank: None, num_images: list[int], keep_ratio: float) -> None:
    references = {"vision": hf_clip(), "projector": hf_projector(), "language": hf_llama()}
    resolved = resolved_model(feature_layer=-2, keep_ratio=keep_ratio)
    model = build_like(resolved, **references)
    batch = make_batch(resolved, num_images)
    visual = None
    if batch.pixels is not None:
        visual = references["projector"](tower_features(references["vision"], batch.pixels, -2))
    check_loss_and_gradients(model, batch, composed_loss(visual, references["language"], batch), references)
