"""The SigLIP tower computes what Hugging Face's does: features, and the loss and gradients of a model with it."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel, SiglipVisionConfig, SiglipVisionModel

from tests.parity.hf import (
    FORWARD_RTOL,
    IMAGE,
    NUM_KEPT,
    NUM_PATCHES,
    build_like,
    check_loss_and_gradients,
    composed_loss,
    hf_llama,
    hf_projector,
    hf_tower,
    make_batch,
    relative,
    resolved_model,
    tower_features,
)

SIGLIP = {"tower": "siglip"}


def siglip() -> PreTrainedModel:
    """Without the pooling head, as models that read patches use it."""
    return hf_tower(SiglipVisionModel, SiglipVisionConfig, vision_use_head=False)


@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_features(one_rank: None, feature_layer: int) -> None:
    reference = siglip()
    model = build_like(resolved_model(feature_layer, vision=SIGLIP), vision=reference)
    pixels = torch.randint(0, 256, (5, 3, IMAGE, IMAGE), dtype=torch.uint8)
    with torch.no_grad():
        found, expected = model.vision(pixels), tower_features(reference, pixels, feature_layer)
    difference = relative(found, expected)
    print(f"{difference:.1e}")
    assert difference <= FORWARD_RTOL


@pytest.mark.parametrize("keep_ratio", [1.0, NUM_KEPT / NUM_PATCHES], ids=["dense", "compressed"])
def test_loss_and_gradients_of_the_whole(one_rank: None, keep_ratio: float) -> None:
    references = {"vision": siglip(), "projector": hf_projector(), "language": hf_llama()}
    resolved = resolved_model(feature_layer=-2, keep_ratio=keep_ratio, vision=SIGLIP)
    model = build_like(resolved, **references)
    batch = make_batch(resolved, [2, 0, 1, 3])
    visual = references["projector"](tower_features(references["vision"], batch.pixels, -2))
    check_loss_and_gradients(model, batch, composed_loss(visual, references["language"], batch), references)
