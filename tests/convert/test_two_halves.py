"""A vision model and a text model joined in one weights folder: which files come from which, and what cannot be exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
import yaml

from megatron_sts.config.errors import ConfigError
from megatron_sts.convert import hf_to_sts, sts_to_hf
from megatron_sts.convert.sources import open_source
from tests.convert import hf_models

OF_BOTH = ("tokenizer.json", "vocab.json", "generation_config.json", "chat_template.jinja", "preprocessor_config.json")


@pytest.fixture
def joined(tmp_path: Path) -> Path:
    """Both halves have all of ``OF_BOTH``, and the vision half a merges.txt besides."""
    for name, half in (("clip", "vision"), ("llama", "language")):
        folder = hf_models.write(name, tmp_path / half)
        for file in OF_BOTH:
            (folder / file).write_text(json.dumps({"from": half}))
    (tmp_path / "vision" / "merges.txt").write_text("vision")
    hf_to_sts.convert(hf_to_sts.two_halves(tmp_path / "vision", tmp_path / "language"), tmp_path / "sts")
    return tmp_path / "sts"


def test_without_a_projector_it_is_not_exported(joined: Path) -> None:
    with pytest.raises(ConfigError, match="has no projector; train one"):
        sts_to_hf.convert(open_source(joined), joined.parent / "back")
    assert not (joined.parent / "back").exists()


def test_only_the_image_processor_comes_from_the_vision_half(joined: Path) -> None:
    found = {name: json.loads((joined / name).read_text()) for name in OF_BOTH}
    language = {name: {"from": "language"} for name in OF_BOTH}
    assert found == language | {"preprocessor_config.json": {"from": "vision"}}
    assert not (joined / "merges.txt").exists()


@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_statistics_of_a_tower_are_read_from_its_processor(file: str, tmp_path: Path) -> None:
    """Wherever transformers wrote them; the published ones need no words."""
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    said = {"do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255, "image_mean": mean, "image_std": std}
    folder = hf_models.write("clip", tmp_path / "vision")
    (folder / file).write_text(json.dumps(said if file.startswith("pre") else {"image_processor": said}))
    hf_to_sts.convert(hf_to_sts.two_halves(folder, hf_models.write("llama", tmp_path / "language")), tmp_path / "sts")
    vision = yaml.safe_load((tmp_path / "sts" / "config.yaml").read_text())["model"]["vision"]
    assert (vision["pixel_mean"], vision["pixel_std"]) == (mean, std)
    (folder / file).write_text(transformers.CLIPImageProcessor().to_json_string())
    assert hf_to_sts.whole(folder).sections["vision"].pixel_mean is None


def test_other_arithmetic_on_pixels_is_refused(tmp_path: Path) -> None:
    folder = hf_models.write("clip", tmp_path / "vision")
    for changes, message in (
        ({"do_rescale": False}, "rescale_factor=1.0: pixels are divided by 255 here"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor=0.00784"),
        ({"image_mean": [0.5]}, r"image_mean=\[0.5\]: three numbers are needed"),
    ):
        (folder / "preprocessor_config.json").write_text(json.dumps(changes))
        with pytest.raises(ConfigError, match=message):
            hf_to_sts.whole(folder)
