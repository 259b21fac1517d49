"""The presets' ``model`` sections are those that Hugging Face's published configs convert to, field by field.

``published/`` keeps the fields of each config.json on the hub that decide the architecture; transformers fills in what they leave out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from megatron_sts.config.architecture import LanguageConfig, VisionConfig
from megatron_sts.config.load import load
from megatron_sts.convert.architectures import read_config, sections_of_whole
from megatron_sts.convert.pairing import Sections, sections_of

EXAMPLES = Path(__file__).parents[2] / "examples"
PUBLISHED = Path(__file__).parent / "published"
SIGLIP, CLIP = "siglip-so400m-patch14-384", "clip-vit-large-patch14-336"
PRESETS = {
    ("llava15_7b", "llava-1.5-7b-hf"),
    ("llava15_7b_fp8", "llava-1.5-7b-hf"),
    ("llava15_13b", "llava-1.5-13b-hf"),
    ("llava_qwen2_7b", SIGLIP, "Qwen2-7B"),
    ("llava_qwen2_7b", SIGLIP, "Qwen2.5-7B"),
    ("llava_qwen25_3b", SIGLIP, "Qwen2.5-3B"),
    ("llava_qwen25_72b", SIGLIP, "Qwen2.5-72B-Instruct"),
    ("llava_llama31_8b", SIGLIP, "Llama-3.1-8B"),
    ("llava_llama31_70b", SIGLIP, "Llama-3.1-70B"),
    ("llava_llama3_70b", CLIP, "Meta-Llama-3-70B"),
}
DRAWN = {"init", "init_std", "embedding_init_std"}


def published(folder: Path) -> Sections:
    return sections_of_whole(read_config(folder), folder)


def spelt_out(section: Any) -> dict[str, Any]:
    """All that decides what a section computes, defaults that follow from other fields filled in."""
    said: dict[str, Any] = section.model_dump(exclude=DRAWN)
    if isinstance(section, LanguageConfig):
        heads = section.num_attention_heads
        said |= {"num_query_groups": section.num_query_groups or heads}
        said |= {"kv_channels": section.kv_channels or section.hidden_size // heads}
    if isinstance(section, VisionConfig):
        said |= {"ffn_hidden_size": section.ffn_hidden_size or 4 * section.hidden_size}
        if section.hf_config is not None:
            said["hf_config"] = AutoConfig.for_model(**section.hf_config).to_dict()
    return said


@pytest.mark.parametrize("names", sorted(PRESETS), ids="-".join)
def test_preset_is_the_published_architecture(names: tuple[str, ...]) -> None:
    preset, *models = names
    ours = sections_of(load(EXAMPLES / preset).model)
    theirs = {part: section for model in models for part, section in published(PUBLISHED / model).items()}
    assert theirs.keys() >= {"vision", "language"}
    for part, section in theirs.items():
        assert spelt_out(ours[part]) == spelt_out(section), part
    assert ours["projector"].type == "mlp2x_gelu"


def test_minigpt4_is_blip2_with_vicuna(tmp_path: Path) -> None:
    """Its own release has no config.json; its tower and Q-Former are BLIP-2's, its decoder Vicuna."""
    blip, vicuna = (
        json.loads((PUBLISHED / name / "config.json").read_text()) for name in ("blip2-flan-t5-xxl", "vicuna-7b-v1.5")
    )
    (tmp_path / "config.json").write_text(json.dumps(blip | {"text_config": vicuna}))
    ours, theirs = sections_of(load(EXAMPLES / "minigpt4_7b").model), published(tmp_path)
    assert set(theirs) == set(ours) == {"vision", "qformer", "projector", "language"}
    vocabulary = {"vocab_size": 32064}  # <image> and padding on top of Vicuna's 32,000, in a multiple of 64
    assert theirs["language"].vocab_size == 32000
    for part, section in theirs.items():
        expected = spelt_out(section) | (vocabulary if part == "language" else {})
        if part == "vision":  # the same, given or left to the default
            expected["pixel_mean"], expected["pixel_std"] = ours[part].pixel_mean, ours[part].pixel_std
            expected["processing"] = "squash"  # no part of config.json
        assert spelt_out(ours[part]) == expected, part
