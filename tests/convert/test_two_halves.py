"""A vision model and a text model joined in one weights folder: which files come from which, and what cannot be exported."""

from __future__ import annotations

from pathlib import Path

import pytest

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
            (folder / file).write_text(half)
    (tmp_path / "vision" / "merges.txt").write_text("vision")
    hf_to_sts.convert(hf_to_sts.two_halves(tmp_path / "vision", tmp_path / "language"), tmp_path / "sts")
    return tmp_path / "sts"


def test_without_a_projector_it_is_not_exported(joined: Path) -> None:
    with pytest.raises(ConfigError, match="has no projector; train one"):
        sts_to_hf.convert(open_source(joined), joined.parent / "back")
    assert not (joined.parent / "back").exists()


def test_only_the_image_processor_comes_from_the_vision_half(joined: Path) -> None:
    found = {name: (joined / name).read_text() for name in OF_BOTH}
    assert found == dict.fromkeys(OF_BOTH, "language") | {"preprocessor_config.json": "vision"}
    assert not (joined / "merges.txt").exists()
