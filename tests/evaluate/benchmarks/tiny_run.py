"""A run of one step of a tiny model whose random answers differ from question to question."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

from tests import warm

CONFIG = {
    "model": {
        "vision": {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 4, "image_size": 64, "patch_size": 16,
                   "feature_layer": -1},
        "language": {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64,
                     "vocab_size": 1024, "init_std": 0.4},
    },
    "stages": [
        {"name": "only", "steps": 1, "optimizer": {"lr": 1.0e-3},
         "batch": {"global_batch_size": 4, "micro_batch_size": 2, "sequence_length": 96}},
    ],
    "evaluation": {"micro_batch_size": 3},
}  # fmt: skip


def megatron_sts(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The real command in ``folder``."""
    command = [sys.executable, "-m", "megatron_sts", *words]
    return warm.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def train(folder: Path) -> None:
    """Makes ``runs/tiny``."""
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    trained = megatron_sts(folder, "train", "tiny.yaml")
    assert trained.returncode == 0, trained.stderr


def answers(folder: Path, name: str) -> dict[str, str]:
    """By key, what is kept somewhere in ``folder`` of a benchmark."""
    [path] = folder.glob(f"**/{name}.jsonl")
    return {entry["key"]: entry["answer"] for entry in map(json.loads, path.read_text().splitlines())}
