"""The same weights under the names that different scripts of megatron-core's give them; and models that came from transformers."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
import yaml
from megatron.core.dist_checkpointing.serialization import load_common_state_dict
from megatron.training import checkpointing
from transformers import LlavaForConditionalGeneration

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.weights_folder import read_sections
from megatron_sts.convert import hf_to_sts, mcore_to_sts, sts_to_hf, sts_to_mcore, verify
from megatron_sts.convert.sources import built_layers, open_source
from megatron_sts.runtime.stored import StoredTensors
from tests.convert import hf_models
from tests.convert.mcore_files import convert, tensors, write, write_config, write_tensors
from tests.data.small_tokenizers import qwen2_like
from tests.runtime.test_plain import Planted


def test_these_checkpoints_are_read_but_for_what_is_wrong(tmp_path: Path) -> None:
    """Also beside an optimizer's state, and objects that nobody looks at."""
    extra = {"optimizer.state.exp_avg.language_model.embedding.word_embeddings.weight": torch.zeros(128, 64)}
    mcore = write(tmp_path / "mcore", extra)
    (mcore / "common.pt").write_bytes(pickle.dumps(Planted(tmp_path / "marker")))
    sts = convert(tmp_path, mcore)
    assert yaml.safe_load((sts / "config.yaml").read_text())["model"]["language"]["vocab_size"] == 128
    assert not (tmp_path / "marker").exists()


def test_norms_in_the_layers_that_follow_them_are_found(tmp_path: Path) -> None:
    """As Transformer Engine's towers have them; megatron-core's decoders are stored so in any case."""
    plain, renamed = tensors(), dict[str, torch.Tensor | None]()
    for key in [key for key in plain if "layers.input_layernorm." in key or "layers.pre_mlp_layernorm." in key]:
        fused = key.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        renamed |= {key: None, fused.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"): plain[key]}
    assert "vision_model.decoder.layers.mlp.linear_fc1.layer_norm_bias" in renamed
    found = StoredTensors(convert(tmp_path, write(tmp_path / "mcore", renamed)))
    expected = plain["vision_model.decoder.layers.pre_mlp_layernorm.bias"]
    assert expected.shape == (2, 32)
    for layer in range(2):
        name = f"vision.encoder.decoder.layers.{layer}.pre_mlp_layernorm.bias"
        assert torch.equal(found.read(name), expected[layer])


WRAPPED = {
    "in DDP": [(r"^(vision_model|vision_projection|language_model)\.", r"\1.module.")],
    "mimo, in DDP": [
        (r"^vision_model\.", "modality_submodules.images.module.encoders.clip.encoder."),
        (r"^vision_projection\.", "modality_submodules.images.module.input_projections.0."),
        (r"^language_model\.", "language_model.module.module."),
    ],
}


@pytest.mark.parametrize("wrapped", WRAPPED)
def test_modules_in_wrappers_are_found(wrapped: str, tmp_path: Path) -> None:
    plain = tensors()
    renamed = {}
    for key, tensor in plain.items():
        name = key
        for pattern, replacement in WRAPPED[wrapped]:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    assert not renamed.keys() & plain.keys()
    (tmp_path / "plain").mkdir()
    expected = StoredTensors(convert(tmp_path / "plain", write_tensors(tmp_path / "plain" / "mcore", plain)))
    found = StoredTensors(convert(tmp_path, write_tensors(tmp_path / "mcore", renamed)))
    assert found.shapes == expected.shapes
    assert all(torch.equal(found.read(name), expected.read(name)) for name in found.shapes)


def test_a_tower_with_more_layers_than_are_projected(tmp_path: Path) -> None:
    """The config may count layers behind the projected one; the folder has what there is."""
    config = write_config(tmp_path / "config.yaml", vision={"num_layers": 4, "feature_layer": -3})
    sts = convert(tmp_path, write(tmp_path / "mcore"), config)
    vision = yaml.safe_load((sts / "config.yaml").read_text())["model"]["vision"]
    assert (vision["num_layers"], vision["feature_layer"]) == (2, -1)


@pytest.mark.parametrize("name", ["llava", "llava, qwen2 tied"])
def test_a_model_of_transformers_there_and_back(name: str, tmp_path: Path) -> None:
    """Every weight but those behind the projected layer, which ``LLaVAModel`` has not."""
    hf_to_sts.convert(hf_to_sts.whole(hf_models.write(name, tmp_path / "hf")), tmp_path / "sts")
    sections = dict(read_sections(tmp_path / "sts"))
    sections["vision"] = built_layers(sections["vision"])
    like = write_tensors(tmp_path / "like", tensors(sections))
    sts_to_mcore.convert(sts_to_mcore.plan(tmp_path / "sts", like), tmp_path / "mcore")
    mcore_to_sts.convert(mcore_to_sts.open_origin(tmp_path / "mcore", tmp_path / "sts"), tmp_path / "again")
    before, after = StoredTensors(tmp_path / "sts"), StoredTensors(tmp_path / "again")
    gone = {name for name in before.shapes if name.startswith("vision.encoder.decoder.layers.2.")}
    assert gone and before.shapes.keys() - gone == after.shapes.keys()
    compared = [name for name in after.shapes if not name.startswith("vision.encoder.ln_post.")]
    assert all(torch.equal(before.read(name), after.read(name)) for name in compared)


def test_megatron_lm_finds_what_was_written(tmp_path: Path) -> None:
    """By its own functions, and in the version in which rows of queries, keys and values stay in their order."""
    mcore = write(tmp_path / "mcore")
    sts_to_mcore.convert(sts_to_mcore.plan(convert(tmp_path, mcore), like=mcore), tmp_path / "exported")
    iteration, is_release = checkpointing.read_metadata(
        checkpointing.get_checkpoint_tracker_filename(tmp_path / "exported")
    )
    found = checkpointing.get_checkpoint_name(tmp_path / "exported", iteration, is_release, return_base_dir=True)
    assert is_release and Path(found) == tmp_path / "exported" / "release"
    assert load_common_state_dict(found)["checkpoint_version"] == 3.0


def test_a_model_goes_on_to_transformers_once_the_image_token_is_known(tmp_path: Path) -> None:
    mcore, config = write(tmp_path / "mcore"), write_config(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="nothing says which token stands for an image; give convert mcore-to-sts a"):
        open_source(convert(tmp_path, mcore))
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    qwen2_like(tokenizer)
    with pytest.raises(ConfigError, match="its <image> is token 700, and the weights have 128 rows"):
        mcore_to_sts.convert(mcore_to_sts.open_origin(mcore, config, tokenizer), tmp_path / "few")
    rows = {
        f"language_model.{name}.weight": torch.randn(704, 64) for name in ("embedding.word_embeddings", "output_layer")
    }
    origin = mcore_to_sts.open_origin(write(tmp_path / "rows", rows), config, tokenizer)
    mcore_to_sts.convert(origin, tmp_path / "whole")
    assert sts_to_hf.convert(open_source(tmp_path / "whole"), tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["image_token_index"] == 700
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    head = hf_models.tensors(tmp_path / "hf")["language_model.lm_head.weight"]
    assert torch.equal(head, rows["language_model.output_layer.weight"])
    LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert verify.command(tmp_path / "hf", tmp_path / "whole") == 0
