"""Exports of runs that start from nothing, have no images, or are no LLaVA."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.schema import RunConfig
from megatron_sts.convert.sources import _origins
from tests import warm
from tests.convert import hf_models

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
STAGE: dict[str, Any] = {
    "name": "only",
    "steps": 1,
    "optimizer": {"lr": 1e-2},
    "batch": {"global_batch_size": 2, "micro_batch_size": 1, "sequence_length": 104},
}
TOWER = {"num_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "image_size": 36, "patch_size": 6}
DECODER = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 96, "vocab_size": 1024}


def sts(folder: Path, *words: object) -> str:
    """Runs megatron-sts; what it printed."""
    command = [sys.executable, "-m", "megatron_sts", *map(str, words)]
    done = warm.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train_and_export(folder: Path, model: dict[str, Any], *words: str, **stage: Any) -> Path:
    """A run of one step on the embedded scenes, and what ``convert sts-to-hf`` makes of it."""
    mode = "words" if model["vision"] is None else "caption"
    written = {
        "model": model,
        "data": {"mode": mode},
        "stages": [{**STAGE, **stage}],
        "logging": {"tensorboard": False},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(written))
    sts(folder, "train", "config.yaml", "--run-dir", "run", *words)
    said = sts(folder, "convert", "sts-to-hf", "--sts", "run", "--hf", "out")
    assert said.splitlines() == [
        "converted: out",
        "out has no tokenizer: the run's is a SentencePiece file, which transformers does not read",
    ]
    return folder / "out"


def check_with_transformers(folder: Path, kind: str) -> None:
    """transformers finds every tensor, and computes what the run's weights compute here."""
    _, info = getattr(transformers, kind).from_pretrained(folder / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    sts(folder, "convert", "hf-to-sts", "--hf", "out", "--sts", "again")
    assert "equal up to fp32 rounding" in sts(folder, "verify", "--hf", "out", "--sts", "again")


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_from_nothing(tower: str, tmp_path: Path) -> None:
    """Layers after the projected one do not exist, and are not there in the export."""
    language = {**DECODER, "num_query_groups": 2, "kv_channels": 8, "rotary_base": 500}
    out = train_and_export(tmp_path, {"vision": {**TOWER, "tower": tower, "feature_layer": -2}, "language": language})
    config = json.loads((out / "config.json").read_text())
    assert config["vision_config"]["num_hidden_layers"] == 2 and config["vision_feature_layer"] == -1
    check_with_transformers(tmp_path, "LlavaForConditionalGeneration")


def test_text_alone(tmp_path: Path) -> None:
    language = {**DECODER, "add_qkv_bias": True, "tie_word_embeddings": True}
    train_and_export(tmp_path, {"vision": None, "language": language})
    check_with_transformers(tmp_path, "Qwen2ForCausalLM")


def test_qformer_and_its_tower_under_tensor_parallelism(tmp_path: Path) -> None:
    """Only the linear layer learns; all else comes back bit for bit."""
    hf_models.write("blip-2", tmp_path / "hf")
    sts(tmp_path, "convert", "hf-to-sts", "--hf", "hf", "--sts", "weights")
    model = yaml.safe_load((tmp_path / "weights" / "config.yaml").read_text())["model"]
    for part in model.values():
        part["init"] = "weights"
    model["language"]["vocab_size"] = 1024
    words = "parallel.tensor_model_parallel_size=2", "--nproc", "2"
    out = train_and_export(tmp_path, model, *words, freeze=["vision", "qformer", "language"])
    before, after = hf_models.tensors(tmp_path / "hf"), hf_models.tensors(out)
    assert before.keys() == after.keys()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name][: len(tensor)])}
    assert moved == {"language_projection.weight", "language_projection.bias"}
    check_with_transformers(tmp_path, "Blip2ForConditionalGeneration")


def test_the_weights_folder_is_that_of_the_first_run(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    for name in ("config.yaml", "model.safetensors.index.json"):
        (tmp_path / "weights" / name).write_text("{}")

    def run(name: str, init: str) -> RunConfig:
        model = {"vision": None, "language": {**DECODER, "init": str(tmp_path / init)}}
        written = {"model": model, "data": {"mode": "words"}, "stages": [STAGE]}
        (tmp_path / name / "checkpoints").mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "config.resolved.yaml").write_text(yaml.safe_dump(written))
        return RunConfig.model_validate(written)

    run("first", "weights")
    run("second", "first/checkpoints/only")  # forgotten since, but its config is there
    assert _origins(run("third", "second")) == {"language": tmp_path / "weights"}
    run("first", "third")
    with pytest.raises(ConfigError, match=r"model\.language\.init=.*: began with a run that began with it"):
        _origins(run("third", "second"))
