"""Names that are not there: composed or decomposed letters, and endings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.samples_file import read_entries
from megatron_sts.config.siblings import named_alike
from megatron_sts.data.image import decode_image
from megatron_sts.data.prepare import prepare
from megatron_sts.data.records import BadSampleError
from tests.data.llava_files import picture, turns

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    ("there", "asked", "said"),
    [
        (f"{DECOMPOSED}.jpg", f"{COMPOSED}.jpg", "the same name in decomposed (NFD) letters is there"),
        (f"{COMPOSED}.jpg", f"{DECOMPOSED}.jpg", "the same name in composed (NFC) letters is there"),
        ("a.JPG", "a.jpg", "a.JPG is there"),
        ("a.png", "a.jpeg", "a.png is there"),
        ("a.v2.jpg", "a.v2", "a.v2.jpg is there"),
        (f"{DECOMPOSED}.png", f"{COMPOSED}.jpg", f"{DECOMPOSED}.png is there"),
        ("x.jsonl", "x.json", "x.jsonl is there"),
        (f"{DECOMPOSED}/a.jpg", f"{COMPOSED}/a.jpg", "whose folder's name has another Unicode form"),
        ("a.json", "a.jpg", ""),
        ("b.jpg", "a.jpg", ""),
        ("a.jpg", "a" * 300 + ".jpg", ""),
    ],
)
def test_the_file_that_may_be_meant_is_named(tmp_path: Path, there: str, asked: str, said: str) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("")
    found = named_alike(tmp_path / asked)
    assert found.startswith(", but ") and found.endswith(said) if said else found == ""


def test_pictures_and_samples_name_it(tmp_path: Path) -> None:
    picture(tmp_path / f"{DECOMPOSED}.png", 1)
    said = "but the same name in decomposed (NFD) letters is there"
    with pytest.raises(BadSampleError, match=rf"no such file, {said[:12]}"):
        decode_image(tmp_path / f"{COMPOSED}.png")
    entries = [
        {"id": "a", "image": f"{COMPOSED}.png", "conversations": turns(1)},
        {"id": "b", "image": "a\0.png", "conversations": turns(1)},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, entries)))
    assert prepare(tmp_path / "x.jsonl", tmp_path, tmp_path / "out", shard_size_mb=1, num_workers=1).num_samples == 0
    first, second = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert first["reason"] == "missing picture" and first["detail"].endswith(said)
    assert second["reason"] == "malformed entry"
    with pytest.raises(ConfigError, match=r"not readable \(No such file or directory, but x\.jsonl is there\)"):
        read_entries(tmp_path / "x.json", "data.path")
