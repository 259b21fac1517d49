"""Towers and Q-Former from ``transformers`` within our model: features, and the loss and gradients of a BLIP-2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.resolve import resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore.module import unwrap
from megatron_sts.mcore.weights import named_weights
from megatron_sts.model.init import build_model
from tests.parity.hf import (
    FORWARD_RTOL,
    GROUPS,
    HEADS,
    HIDDEN,
    IMAGE,
    LAYERS,
    NUM_PATCHES,
    PATCH,
    VISION_HEADS,
    VISION_HIDDEN,
    VISION_LAYERS,
    VOCAB,
    build_like,
    check_loss_and_gradients,
    composed_loss,
    hf_clip,
    hf_tower,
    make_batch,
    randomize,
    relative,
    resolved_model,
)

MEAN, STD = (0.3, 0.4, 0.5), (0.2, 0.25, 0.3)
SIZES = {
    "hidden_size": VISION_HIDDEN,
    "intermediate_size": 4 * VISION_HIDDEN,
    "num_hidden_layers": VISION_LAYERS,
    "num_attention_heads": VISION_HEADS,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
NUM_QUERIES, QFORMER_HIDDEN = 12, 32
QFORMER = {
    "num_query_tokens": NUM_QUERIES,
    "num_layers": 3,
    "hidden_size": QFORMER_HIDDEN,
    "num_attention_heads": 4,
    "ffn_hidden_size": 80,
}


def written_tower(model_type: str) -> dict[str, Any]:
    return {"tower": "hf", "hf_config": {"model_type": model_type, **SIZES}, "pixel_mean": MEAN, "pixel_std": STD}


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels / 255 - mean) / std


TOWERS = {
    "clip_vision_model": hf_clip,
    "siglip_vision_model": lambda: hf_tower(SiglipVisionModel, SiglipVisionConfig),
    "dinov2_with_registers": lambda: hf_tower(Dinov2WithRegistersModel, Dinov2WithRegistersConfig),
}


@pytest.mark.parametrize("feature_layer", [-1, -2])
@pytest.mark.parametrize("model_type", TOWERS)
def test_features_and_what_learns(one_rank: None, model_type: str, feature_layer: int) -> None:
    """All parameters get gradients, those of poolers and heads are none, and features are the whole model's."""
    reference = TOWERS[model_type]()
    model = build_like(resolved_model(feature_layer, vision=written_tower(model_type)), vision=reference)
    pixels = torch.randint(0, 256, (5, 3, IMAGE, IMAGE), dtype=torch.uint8)
    found = model.vision(pixels)
    with torch.no_grad():
        outputs = reference(normalised(pixels), output_hidden_states=True)
    expected = outputs.last_hidden_state if feature_layer == -1 else outputs.hidden_states[-2]
    difference = relative(found.detach(), expected[:, -NUM_PATCHES:])
    print(f"{difference:.1e}")
    assert difference <= FORWARD_RTOL
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in model.vision.parameters())


def test_bf16_leaves_the_rotary_frequencies_in_fp32(one_rank: None) -> None:
    """As transformers does: in bf16 they would be off by up to 0.4 %, and angles with them."""
    vision = {**written_tower("dinov3_vit"), "hf_config": {"model_type": "dinov3_vit", **SIZES, "rope_theta": 50.0}}
    run = resolved_model(vision=vision).config.model_dump() | {"precision": {"params": "bf16"}}
    (chunk,) = build_model(resolve(RunConfig.model_validate(run)), SkipGate())
    tower = unwrap(chunk).vision
    assert {parameter.dtype for parameter in tower.parameters()} == {torch.bfloat16}
    width = VISION_HIDDEN // VISION_HEADS // 4  # frequencies: half of a head's pairs for each of the two axes
    (frequencies,) = (buffer for name, buffer in tower.named_buffers() if name.endswith("inv_freq"))
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, 50.0 ** -(torch.arange(width) / width), rtol=1e-6, atol=0)
    assert tower(torch.randint(0, 256, (2, 3, IMAGE, IMAGE), dtype=torch.uint8)).dtype == torch.bfloat16


def blip2() -> Blip2ForConditionalGeneration:
    torch.manual_seed(6)
    decoder = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 112,
               "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
               "rms_norm_eps": 1e-6, "rope_theta": 5000.0}  # fmt: skip
    qformer = {"num_hidden_layers": 3, "hidden_size": QFORMER_HIDDEN, "num_attention_heads": 4, "intermediate_size": 80}
    config = Blip2Config(
        vision_config=SIZES,
        qformer_config=qformer,
        text_config=decoder,
        num_query_tokens=NUM_QUERIES,
        attn_implementation="eager",
    )
    model = Blip2ForConditionalGeneration(config).eval()
    randomize(model)
    return model


class References(torch.nn.Module):
    """BLIP-2's queries and Q-Former under our names."""

    def __init__(self, blip: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        self.query_tokens, self.encoder = blip.query_tokens, blip.qformer


@pytest.mark.parametrize("keep_ratio", [1.0, 0.5], ids=["dense", "compressed"])
@pytest.mark.parametrize("num_images", [[2, 0, 1, 3], [0, 0]], ids=["mixed", "text only"])
def test_loss_and_gradients_of_blip2(one_rank: None, num_images: list[int], keep_ratio: float) -> None:
    blip = blip2()
    references = {
        "vision": blip.vision_model,
        "qformer": References(blip),
        "projector": blip.language_projection,
        "language": blip.language_model,
    }
    vision, projector = written_tower("blip_2_vision_model"), {"type": "linear"}
    resolved = resolved_model(-1, keep_ratio, vision=vision, qformer=QFORMER, projector=projector)
    model = build_like(resolved, **references).train()
    batch = make_batch(resolved, num_images)
    visual = None
    if batch.pixels is not None:
        visual = blip.get_image_features(normalised(batch.pixels)).pooler_output
    check_loss_and_gradients(model, batch, composed_loss(visual, blip.language_model, batch), references)


def test_weights_under_their_own_names(one_rank: None, tmp_path: Path) -> None:
    """As examples/minigpt4_7b/README.md puts them into files."""
    blip = blip2()
    tower = {f"vision.encoder.{name}": tensor for name, tensor in blip.vision_model.state_dict().items()}
    qformer = {f"qformer.encoder.{name}": tensor for name, tensor in blip.qformer.state_dict().items()}
    save_file(tower, tmp_path / "vit.safetensors")
    save_file({"qformer.query_tokens": blip.query_tokens, **qformer}, tmp_path / "qformer.safetensors")
    vision = {**written_tower("blip_2_vision_model"), "init": str(tmp_path / "vit.safetensors")}
    qformer_section = {**QFORMER, "init": str(tmp_path / "qformer.safetensors")}
    (model,) = build_model(resolved_model(vision=vision, qformer=qformer_section), SkipGate())
    pixels = torch.randint(0, 256, (2, 3, IMAGE, IMAGE), dtype=torch.uint8)
    with torch.no_grad():
        image = blip.vision_model(normalised(pixels)).last_hidden_state
        queries = blip.query_tokens.expand(2, -1, -1)
        expected = blip.qformer(query_embeds=queries, encoder_hidden_states=image).last_hidden_state
        assert relative(model.features(pixels), expected) <= FORWARD_RTOL


UNUSABLE = [
    ({"model_type": "vitt"}, "model.vision.hf_config.model_type=vitt: transformers knows no such model"),
    ({"model_type": "pvt_v2"}, "model.vision.hf_config.model_type=pvt_v2: Validation error for field"),
    (
        {"model_type": "resnet"},
        "model.vision.hf_config.model_type=resnet: gives features [2048, 1, 1] for 16 patches of",
    ),
]


@pytest.mark.parametrize(("hf_config", "message"), UNUSABLE, ids=["unknown", "wrong option", "no ViT"])
def test_a_tower_that_cannot_be_used_is_refused(one_rank: None, hf_config: dict[str, Any], message: str) -> None:
    vision = {**written_tower("any"), "hf_config": hf_config}
    with pytest.raises(ConfigError) as error:
        build_model(resolved_model(vision=vision), SkipGate())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_clip_tower_shows_its_class_token_to_a_qformer(one_rank: None) -> None:
    model = build_like(resolved_model(qformer=QFORMER), vision=hf_clip())
    pixels = torch.randint(0, 256, (2, 3, IMAGE, IMAGE), dtype=torch.uint8)
    with torch.no_grad():
        assert model.vision(pixels).shape == (2, 1 + NUM_PATCHES, VISION_HIDDEN)
        assert model.features(pixels).shape == (2, NUM_QUERIES, QFORMER_HIDDEN)


def test_frozen_parts_keep_nothing_for_a_backward_pass(one_rank: None) -> None:
    (model,) = build_model(resolved_model(qformer=QFORMER), SkipGate())
    pixels = torch.randint(0, 256, (2, 3, IMAGE, IMAGE), dtype=torch.uint8)
    for part, parameter in ((name.split(".")[0], parameter) for name, parameter in named_weights([model])):
        parameter.requires_grad_(part not in ("vision", "qformer"))
    assert not model.features(pixels).requires_grad
    model.qformer.requires_grad_(True)
    features = model.features(pixels)
    features.sum().backward()
    assert model.qformer.query_tokens.grad is not None
