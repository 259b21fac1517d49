"""The README's commands: a checkpoint of megatron-core's is trained here, and goes back to it and on to transformers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_sts.convert import mcore_to_sts
from megatron_sts.convert.sources import open_weights
from megatron_sts.runtime.stored import StoredTensors
from tests import warm
from tests.convert import hf_models, mcore_models
from tests.convert.mcore_files import write

pytestmark = pytest.mark.timeout(300)
ROWS = 2048
STAGE: dict[str, Any] = {
    "name": "finetune",
    "steps": 1,
    "freeze": ["vision"],
    "optimizer": {"lr": 1e-2},
    "batch": {"global_batch_size": 2, "micro_batch_size": 2, "sequence_length": 96},
}


def sts(folder: Path, *words: object) -> str:
    """Runs megatron-sts; what it printed."""
    done = warm.run(
        [sys.executable, "-m", "megatron_sts", *map(str, words)], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def test_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = {f"language_model.{name}.weight": 0.1 * torch.randn(ROWS, 64) for name in ("embedding.word_embeddings", "output_layer")}  # fmt: skip
    write(tmp_path / "checkpoints", rows)
    model = {part: section | {"init": "weights"} for part, section in mcore_models.SECTIONS.items()}
    model["projector"] = {"init": "weights"}
    model["language"]["vocab_size"] = ROWS
    run = {"model": model, "data": {"source": "scenes"}, "stages": [STAGE], "logging": {"tensorboard": False}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(run))
    sts(tmp_path, "convert", "mcore-to-sts", "--mcore", "checkpoints", "--config", "config.yaml", "--sts", "weights")
    sts(tmp_path, "train", "config.yaml", "--run-dir", "runs/one")
    said = sts(tmp_path, "convert", "sts-to-mcore", "--sts", "runs/one", "--like", "checkpoints", "--mcore", "exported")
    assert said == "converted: exported\n"
    sts(tmp_path, "convert", "sts-to-hf", "--sts", "runs/one", "--hf", "hf")

    mcore_to_sts.convert(mcore_to_sts.open_origin(tmp_path / "exported", tmp_path / "config.yaml"), tmp_path / "again")
    before, after = StoredTensors(tmp_path / "weights"), StoredTensors(tmp_path / "again")
    _, [trained, *_], _ = open_weights(tmp_path / "runs/one")
    assert all(torch.equal(after.read(name), trained.read(name)) for name in trained.shapes)
    changed = {name for name in after.shapes if not torch.equal(after.read(name), before.read(name))}
    assert "language.decoder.layers.3.mlp.linear_fc1.weight" in changed
    assert not any(name.startswith("vision.") for name in changed)
    head = hf_models.tensors(tmp_path / "hf")["language_model.lm_head.weight"]
    assert torch.equal(head, after.read("language.output_layer.weight")[: len(head)])
