"""A run that begins with a weights folder computes with its weights what they were made for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sts.config.architecture import LanguageConfig, VisionConfig
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.weights_folder import check_same_model

LANGUAGE = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_hidden_size": 64, "vocab_size": 100}
VISION = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"vision": VISION, "language": LANGUAGE}}))
    return tmp_path


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("language", "rotary_base", 500000),
        ("language", "norm_epsilon", 1e-6),
        ("language", "rope_scaling", {"factor": 8.0}),
        ("language", "num_attention_heads", 8),
        ("vision", "norm_epsilon", 1e-3),
        ("vision", "tower", "siglip"),
    ],
)
def test_other_settings_are_refused(folder: Path, part: str, field: str, value: Any) -> None:
    section = (
        LanguageConfig(**LANGUAGE | {field: value}) if part == "language" else VisionConfig(**VISION | {field: value})
    )
    with pytest.raises(
        ConfigError, match=rf"^model\.{part}\.{field}=.*: the weights in .* were made with .*; correct it$"
    ):
        check_same_model(part, section, folder)


def test_defaults_may_be_spelled_out_and_the_rest_is_free(folder: Path) -> None:
    said = {
        "norm_epsilon": 9.999999747378752e-06,
        "num_query_groups": 4,
        "kv_channels": 8,
        "vocab_size": 128,
        "init": "x",
        "init_std": 0.1,
    }
    check_same_model("language", LanguageConfig(**LANGUAGE | said), folder)
    seen = {"ffn_hidden_size": 128, "norm_epsilon": 1e-5, "feature_layer": -1, "init": "x"}
    check_same_model("vision", VisionConfig(**VISION | seen), folder)
