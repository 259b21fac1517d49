"""Which models can be described: Hugging Face towers, SigLIP, Q-Formers, RoPE scaling, and what is refused of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import dump, load
from megatron_sts.config.resolve import resolve

HF_CONFIG = (
    "{model_type: vit, num_hidden_layers: 6, hidden_size: 192, num_attention_heads: 6, image_size: 96, patch_size: 8}"
)
HF = f"model.vision={{tower: hf, hf_config: {HF_CONFIG}, pixel_mean: [0.5, 0.5, 0.5], pixel_std: [0.5, 0.5, 0.5]}}"
MINIGPT4 = [HF, "model.qformer={num_query_tokens: 8}", "model.projector={type: linear}"]
SCALING = "model.language.rope_scaling"

REFUSED = [
    (["model.vision.tower=hf"], "model.vision.hf_config=null: tower=hf is built from it"),
    ([HF, "model.vision.hf_config.model_type=null", "model.vision.tower=clip"], "model.vision.hf_config={...}: tower=clip reads"),
    ([HF, "model.vision.pixel_mean=null"], "model.vision.pixel_mean=null: tower=hf has no default; give three numbers"),
    ([HF, "model.vision.norm_epsilon=1e-5"], "model.vision.norm_epsilon=1e-05: tower=hf takes it from hf_config"),
    ([HF, "model.vision.hidden_size=96"], "model.vision: hidden_size=96: hf_config says 192; remove it"),
    (["model.vision.tower=siglip", "model.vision.patch_size=97"], "model.vision.patch_size=97: above image_size=96"),
    (["model.qformer={hidden_size: 100}"], "model.qformer.hidden_size=100: not a multiple of num_attention_heads=12"),
    (["model.vision=null", "model.qformer={}"], "model.qformer={...}: model.vision is null"),
    (["stages.0.freeze=[qformer]"], "stages.alignment.freeze=[qformer]: model.qformer is null, so there is no qformer"),
    ([*MINIGPT4, "stages.0.freeze=[vision,qformer,projector,language]"], "projector, language]: nothing is left to train"),
    ([*MINIGPT4, "stages.0.vtc.sampler=anchored"], "stages.alignment.vtc.sampler=anchored: a Q-Former's tokens form no grid"),
    ([*MINIGPT4, "stages.0.vtc.sampler=pooled"], "stages.alignment.vtc.sampler=pooled: a Q-Former's tokens form no grid"),
    ([f"{SCALING}={{factor: 8, low_freq_factor: 4}}"], f"{SCALING}: low_freq_factor=4 must be below high_freq_factor=4"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_refused_in_one_line(path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        resolve(load(path, overrides))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_sizes_come_from_the_hugging_face_config(path: Path, tmp_path: Path) -> None:
    resolved = resolve(load(path, [HF]))
    vision = resolved.config.model.vision
    assert vision is not None
    assert (vision.num_layers, vision.hidden_size, vision.num_attention_heads) == (6, 192, 6)
    assert resolved.num_vision_layers == 5 and resolved.stages[0].visual_tokens_in == 144
    dump(resolved, tmp_path / "dumped.yaml")
    assert resolve(load(tmp_path / "dumped.yaml")) == resolved


def test_a_hugging_face_tower_is_not_split(path: Path) -> None:
    four = "parallel.tensor_model_parallel_size=4"  # which does not divide the tower's 6 heads
    assert resolve(load(path, [HF, four])).world_size == 4


def test_queries_are_the_visual_tokens(path: Path) -> None:
    stage = resolve(load(path, MINIGPT4)).stages[0]
    assert (stage.visual_tokens_in, stage.tokens(0).of_image(0), stage.tokens(0).sequence_length) == (8, 4, 188)


def test_pixels_that_fill_no_patch_are_left_out(path: Path) -> None:
    overrides = ["model.vision.tower=siglip", "model.vision.image_size=101"]
    assert resolve(load(path, overrides)).stages[0].visual_tokens_in == 144
