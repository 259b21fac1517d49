"""Shards as others write them, indexed by Energon's own command."""

from __future__ import annotations

import contextlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import yaml
from megatron.energon.flavors import BaseWebdatasetFactory

from tests.data.llava_files import picture, turns

Files = Callable[[str], dict[str, bytes]]
"""The files of a sample, by name, for its key."""


def text(number: str, num_images: int = 1) -> bytes:
    return json.dumps({"id": f"s{number}", "conversations": turns(num_images, f"answer {number}")}).encode()


def usual(number: str) -> dict[str, bytes]:
    return {f"{number}.json": text(number, 0)}


def write_shards(
    folder: Path, files: Files = usual, *, num_samples: int = 20, num_shards: int = 1, ratio: str = "1,0,0"
) -> Path:
    """As ``energon prepare --split-ratio RATIO --sample-type CrudeWebdataset`` leaves a folder of tar files."""
    folder.mkdir(parents=True)
    names = [f"shard-{number}.tar" for number in range(num_shards)]
    for shard, name in enumerate(names):
        with tarfile.open(folder / name, "w") as tar:
            for number in range(shard, num_samples, num_shards):
                for file, content in files(f"{number:04d}").items():
                    member = tarfile.TarInfo(file)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    parts = [(part, float(share)) for part, share in zip(("train", "val", "test"), ratio.split(","), strict=True)]
    with contextlib.redirect_stdout(io.StringIO()):
        BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_ratio=parts, shuffle_seed=None, workers=1)
    write_class(folder, "CrudeWebdataset")
    return folder


def write_class(folder: Path, name: str) -> None:
    (folder / ".nv-meta" / "dataset.yaml").write_text(yaml.dump({"__module__": "megatron.energon", "__class__": name}))


def seen(folder: Path, number: int) -> bytes:
    """A picture's bytes."""
    return picture(folder / f"{number}.png", number)
