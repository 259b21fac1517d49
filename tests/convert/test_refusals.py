"""What cannot be converted is refused in one line, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from megatron_sts.config.architecture import LanguageConfig, ProjectorConfig, QFormerConfig, VisionConfig
from megatron_sts.config.errors import ConfigError
from megatron_sts.convert import hf_configs, hf_to_sts
from megatron_sts.convert.folder import read_hf_config
from tests.convert import hf_models


def refused(folder: Path) -> str:
    with pytest.raises(ConfigError) as error:
        hf_to_sts.convert(hf_to_sts.whole(folder), folder.parent / "out")
    message = str(error.value)
    assert "\n" not in message and not (folder.parent / "out").exists()
    return message


def test_wrong_tensors_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    hf = hf_models.write("llava", tmp_path / "hf")
    weights = hf_models.tensors(hf)
    name = "language_model.model.layers.2.self_attn.k_proj.weight"
    hf_models.rewrite(hf, {key: tensor for key, tensor in weights.items() if key != name})
    assert f"has no tensor {name}" in refused(hf)
    hf_models.rewrite(hf, weights | {name: torch.zeros(8, 64)})
    assert f"tensor {name} has shape (8, 64), but config.json makes it (16, 64)" in refused(hf)
    hf_models.rewrite(hf, weights | {"language_model.model.layers.2.self_attn.k_norm.weight": torch.zeros(8)})
    assert "nothing of ours holds its tensor language_model.model.layers.2.self_attn.k_norm.weight" in refused(hf)
    hf_models.rewrite(hf, weights | {"audio_tower.conv.weight": torch.zeros(8)})
    assert "nothing of ours holds its tensor audio_tower.conv.weight" in refused(hf)
    hf_models.rewrite(hf, weights | {"lm_head.weight": weights["language_model.lm_head.weight"].clone()})
    assert "are the same weight" in refused(hf)


def test_models_that_ours_cannot_compute_are_refused(tmp_path: Path) -> None:
    hf = hf_models.write("llama", tmp_path / "hf")
    written = json.loads((hf / "config.json").read_text())
    for changes, message in (
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "rope_type=yarn"),
        ({"model_type": "bert"}, "model_type=bert"),
    ):
        hf_models.edit_config(hf, **changes)
        assert message in refused(hf)
        (hf / "config.json").write_text(json.dumps(written))


def test_parts_that_ours_cannot_compute_are_refused(tmp_path: Path) -> None:
    hf = hf_models.write("llava", tmp_path / "hf")
    written = json.loads((hf / "config.json").read_text())
    for changes, message in (
        ({"text_config": {"model_type": "mistral", "sliding_window": None}}, "model_type=mistral"),
        ({"text_config": {"model_type": "mixtral"}}, "num_local_experts=8: needs a mixture of experts"),
        ({"vision_config": {"model_type": "pixtral"}}, "model_type=pixtral"),
        ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer=[-2, -5]"),
        ({"vision_feature_select_strategy": "full"}, "vision_feature_select_strategy=full"),
        ({"vision_feature_layer": 5}, "vision_feature_layer=5: the tower has 3 layers"),
        ({"vision_feature_layer": -4}, "vision_feature_layer=-4: the tower has 3 layers"),
        # What transformers refuses by an exception of its own, and what it takes and no run of ours may have.
        ({"text_config": written["text_config"] | {"hidden_size": "64"}}, "'hidden_size' expected int, got str"),
        ({"text_config": written["text_config"] | {"hidden_size": 66}}, "hidden size (66) is not a multiple"),
        ({"text_config": written["text_config"] | {"num_hidden_layers": 0}}, "num_layers=0: it should be greater"),
        ({"vision_config": written["vision_config"] | {"image_size": [32, 32]}}, "image_size=[32, 32]: "),
    ):
        hf_models.edit_config(hf, **changes)
        assert message in refused(hf)
        (hf / "config.json").write_text(json.dumps(written))


NAMED = {
    "mixtral": "num_local_experts=8: needs a mixture of experts",
    "qwen2_moe": "num_experts=60: needs a mixture of experts",
    "deepseek_v3": "n_routed_experts=256: needs a mixture of experts",
    "qwen2_vl": "model_type=qwen2_vl: needs M-RoPE",
    "qwen2_5_vl": "model_type=qwen2_5_vl: needs M-RoPE",
    "mistral": "sliding_window=4096: needs sliding-window or chunked attention",
    "gemma2": "final_logit_softcapping=30.0: needs soft-capping of logits",
    "gemma3": "needs sliding-window or chunked attention",
    "phi": "partial_rotary_factor=0.5: needs partial rotary embeddings",
    "glm4": "partial_rotary_factor=0.5: needs partial rotary embeddings",
    "llava_next_video": "image_grid_pinpoints=<5 entries>: needs pictures in tiles (AnyRes) of another kind",
    "t5": "is_encoder_decoder=True: needs a text encoder",
    "qwen3": "model_type=qwen3: not supported; known are llama, qwen2",
}


@pytest.mark.parametrize("kind", NAMED)
def test_what_this_project_does_not_do_is_said_by_name(kind: str, tmp_path: Path) -> None:
    """With transformers' own config of each kind; no weights are looked at."""
    transformers.AutoConfig.for_model(kind).save_pretrained(tmp_path / "hf")
    message = refused(tmp_path / "hf")
    assert NAMED[kind] in message and message.endswith("this model cannot be converted")


def test_files_that_are_no_whole_model_are_refused(tmp_path: Path) -> None:
    hf = hf_models.write("llama", tmp_path / "hf")
    written = (hf / "config.json").read_text()
    for changes, message in (
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantised weights cannot be read; take the model",
        ),
        ({"mm_vision_tower": "openai/clip-vit-large-patch14-336"}, "LLaVA's own format cannot be read; take the same"),
        ({"model_type": "x", "auto_map": {"AutoConfig": "configuration_x.X"}}, "contains custom code"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial rotary",
        ),
    ):
        hf_models.edit_config(hf, **changes)
        assert message in refused(hf)
        (hf / "config.json").write_text(written)
    (hf / "config.json").write_text("[]")
    assert "config.json" in refused(hf)
    (hf / "adapter_config.json").write_text("{}")
    assert "adapters such as LoRA are not supported, and it has adapter_config.json; merge it" in refused(hf)


def test_sliding_windows_that_no_layer_has_are_no_reason(tmp_path: Path) -> None:
    """Qwen2's window begins at max_window_layers."""
    hf = hf_models.write("qwen2", tmp_path / "hf")
    window = {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}
    hf_models.edit_config(hf, **window, max_window_layers=4)
    assert hf_to_sts.whole(hf).sections["language"].num_layers == 4
    hf_models.edit_config(hf, **window, max_window_layers=3)
    assert "layer_types=<4 entries>: needs sliding-window" in refused(hf)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    hf = hf_models.write("llama", tmp_path / "hf", max_shard_size="100KB")
    shard = sorted(hf.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    assert f"{shard}: damaged" in refused(hf)
    shard.unlink()
    assert f"{shard}: missing" in refused(hf)
    for written in ("[1]", '{"weight_map": {"a": 1}}'):
        (hf / "model.safetensors.index.json").write_text(written)
        assert "model.safetensors.index.json: damaged" in refused(hf)
    (hf / "config.json").unlink()
    assert "holds no config.json" in refused(hf)


def test_a_weights_folders_damaged_config_is_one_line(tmp_path: Path) -> None:
    for written in (None, "{", "[1]", '{"hidden_size": 4}'):
        if written is not None:
            (tmp_path / "hf_config.json").write_text(written)
        with pytest.raises(ConfigError, match=r"hf_config.json: missing or damaged \(.*\); convert the weights again$"):
            read_hf_config(tmp_path)


def test_older_files_are_refused_with_a_remedy(tmp_path: Path) -> None:
    hf = hf_models.write("llama", tmp_path / "hf")
    (hf / "model.safetensors").rename(hf / "pytorch_model.bin")
    assert refused(hf).endswith("its *.bin are not read: load it with transformers and save_pretrained it")


def test_models_that_hugging_face_lacks_are_refused() -> None:
    sizes = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
    vision = VisionConfig(**sizes, image_size=32, patch_size=8)
    language = LanguageConfig(**sizes, ffn_hidden_size=64, vocab_size=100)
    sections = {"vision": vision, "projector": ProjectorConfig(type="linear"), "language": language}
    with pytest.raises(ConfigError, match=r"model\.projector\.type=linear: LLaVA in transformers has another"):
        hf_configs.from_sections(sections)
    with pytest.raises(ConfigError, match=r"model\.vision\.tower=clip: BLIP-2 in transformers has another"):
        hf_configs.from_sections({**sections, "qformer": QFormerConfig()})
