"""Hugging Face -> weights folder -> Hugging Face gives every tensor back bit for bit, and transformers reads the result."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlavaForConditionalGeneration, PreTrainedModel

from megatron_sts.convert import hf_to_sts, sts_to_hf
from megatron_sts.convert.sources import open_source
from tests.convert import hf_models


def round_trip(hf: Path, tmp_path: Path, shard_bytes: int = 2**30) -> Path:
    sts, back = tmp_path / "sts", tmp_path / "back"
    assert hf_to_sts.convert(hf_to_sts.whole(hf), sts, shard_bytes)
    assert sts_to_hf.convert(open_source(sts), back, shard_bytes)
    return back


def load(folder: Path) -> PreTrainedModel:
    """By transformers, which must find every tensor and use every one."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    kind = getattr(transformers, name)
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_every_tensor_comes_back(name: str, tmp_path: Path) -> None:
    hf = hf_models.write(name, tmp_path / "hf")
    back = round_trip(hf, tmp_path)
    before, after = (dict(load(folder).state_dict()) for folder in (hf, back))
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert sum(map(torch.Tensor.numel, hf_models.tensors(hf).values())) == sum(
        map(torch.Tensor.numel, hf_models.tensors(back).values())
    )


@pytest.mark.parametrize("name", ["llava", "qwen2 tied"])
def test_shards_in_and_out(name: str, tmp_path: Path) -> None:
    hf = hf_models.write(name, tmp_path / "hf", max_shard_size="40KB")
    back = round_trip(hf, tmp_path, shard_bytes=30_000)
    assert min(len(list(folder.glob("*.safetensors"))) for folder in (hf, tmp_path / "sts", back)) > 3
    before, after = (dict(load(folder).state_dict()) for folder in (hf, back))
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def test_bf16_stays_bf16(tmp_path: Path) -> None:
    hf_models.MODELS["llava"]().to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    back = round_trip(tmp_path / "hf", tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(back, dtype="auto")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


SPELLINGS = {
    "transformers 4 on the hub": [("^vision_tower\\.(?!vision_model)", "vision_tower.vision_model.")],
    "transformers 5 in memory": [
        ("^language_model\\.model\\.", "model.language_model."),
        ("^language_model\\.lm_head", "lm_head"),
        ("^(vision_tower|multi_modal_projector)", r"model.\1"),
    ],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_all_spellings_give_the_same(spelling: str, tmp_path: Path) -> None:
    hf = hf_models.write("llava", tmp_path / "hf")
    hf_to_sts.convert(hf_to_sts.whole(hf), tmp_path / "sts")
    weights = hf_models.tensors(hf)
    for pattern, replacement in SPELLINGS[spelling]:
        weights = {re.sub(pattern, replacement, name): tensor for name, tensor in weights.items()}
    assert weights.keys() != hf_models.tensors(hf).keys()
    hf_models.rewrite(hf, weights)
    hf_to_sts.convert(hf_to_sts.whole(hf), tmp_path / "other")
    first, second = (hf_models.tensors(tmp_path / folder) for folder in ("sts", "other"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_buffers_and_tied_copies_of_older_files_are_left_out(tmp_path: Path) -> None:
    hf = hf_models.write("qwen2 tied", tmp_path / "hf")
    weights = hf_models.tensors(hf)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    hf_models.rewrite(hf, weights)
    back = round_trip(hf, tmp_path)
    assert "lm_head.weight" not in hf_models.tensors(back)


EMBEDDING, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


@pytest.mark.parametrize("at_the_top", [True, False])
@pytest.mark.parametrize("stored", ["embedding", "head", "both", "both, differing"])
def test_what_is_tied_is_what_transformers_ties(stored: str, at_the_top: bool, tmp_path: Path) -> None:
    """Whatever part of a LLaVA's config calls it tied: a stored head of its own counts, one of both is the other."""
    hf = hf_models.write("llava, qwen2 tied", tmp_path / "hf")
    text = json.loads((hf / "config.json").read_text())["text_config"] | {"tie_word_embeddings": not at_the_top}
    hf_models.edit_config(hf, tie_word_embeddings=at_the_top, text_config=text)
    weights = hf_models.tensors(hf)
    embedding = weights.pop(EMBEDDING)
    weights |= {EMBEDDING: embedding} if stored != "head" else {}
    if stored != "embedding":
        head = embedding.clone()
        head[-1, -1] += 1.0 if stored.endswith("differing") else 0.0
        weights[HEAD] = head
    hf_models.rewrite(hf, weights)
    back = round_trip(hf, tmp_path)
    before, after = load(hf), load(back)
    assert (before.lm_head.weight is before.get_input_embeddings().weight) == (HEAD not in hf_models.tensors(back))
    assert after.config.tie_word_embeddings == (stored != "both, differing")
    for key, tensor in before.state_dict().items():
        assert torch.equal(tensor, after.state_dict()[key]), key


def test_the_vision_half_of_a_clip(tmp_path: Path) -> None:
    hf = hf_models.write("clip", tmp_path / "hf")
    sections = hf_to_sts.whole(hf).sections
    weights = {f"vision_model.{name}": tensor for name, tensor in hf_models.tensors(hf).items()}
    hf_models.rewrite(hf, {**weights, "text_model.final_layer_norm.bias": torch.zeros(8), "logit_scale": torch.ones(1)})
    vision = hf_models.clip_config().to_dict()
    hf_models.edit_config(hf, model_type="clip", architectures=["CLIPModel"], vision_config=vision, text_config={})
    assert hf_to_sts.whole(hf).sections == sections
    back = round_trip(hf, tmp_path)
    assert hf_models.tensors(back).keys() == weights.keys()
