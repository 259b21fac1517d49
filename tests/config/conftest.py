"""A small written config that the tests of this room vary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

WRITTEN: dict[str, Any] = {
    "model": {
        "vision": {"num_layers": 6, "hidden_size": 192, "num_attention_heads": 6, "image_size": 96, "patch_size": 8},
        "language": {
            "num_layers": 12,
            "hidden_size": 256,
            "num_attention_heads": 8,
            "num_query_groups": 4,
            "ffn_hidden_size": 704,
            "vocab_size": 2048,
        },
    },
    "stages": [
        {
            "name": "alignment",
            "freeze": ["vision", "language"],
            "steps": 10,
            "optimizer": {"lr": 1e-3},
            "batch": {"global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 192},
            "vtc": {"keep_ratio": 0.5},
        },
        {
            "name": "finetune",
            "freeze": ["vision"],
            "epochs": 1,
            "optimizer": {"lr": 1e-4},
            "batch": {"global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 192},
            "lds": {"alpha": 0.5},
        },
    ],
}


@pytest.fixture(scope="session")
def written() -> dict[str, Any]:
    """The config as a mapping; not to be changed."""
    return WRITTEN


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The config as a file."""
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(WRITTEN))
    return file
