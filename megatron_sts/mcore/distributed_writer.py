"""Writes tensors into a folder of megatron-core's ``torch_dist`` format, one at a time, without the ranks that will load it.

Each tensor, or each layer's share of a stacked one, is a file of its own: a file that is there is whole, so that an interrupted
call goes on where it was. The two files without which nothing can be loaded come last.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

COMMON = "common_state/shard_0_1"
"""The object that holds what belongs to no tensor, since megatron-core 0.19; before, it was in a file."""
COMMON_FILE = "common.pt"
METADATA = ".metadata"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Part:
    """A box of the tensor ``key``, whose whole shape is ``shape``."""

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Of its numbers."""
        return math.prod(self.sizes) * self.dtype.itemsize


def write_part(folder: Path, number: int, part: Part) -> None:
    """Writes the part's file, unless it is there."""
    path = folder / _name(number)
    if path.exists():
        return
    tensor = part.make()
    assert (tuple(tensor.shape), tensor.dtype) == (part.sizes, part.dtype), part.key
    _write(path, tensor.clone(memory_format=torch.contiguous_format))  # torch.save keeps all memory that a view is of


def finish(folder: Path, parts: Sequence[Part], empty_objects: Iterable[str], common: dict[str, Any]) -> None:
    """Writes what makes the parts, in the order of their numbers, a checkpoint.

    ``empty_objects``: names under which whoever loads it asks for an object, and gets None. ``common``: plain values;
    they are put where the format has them, by whether ``empty_objects`` names ``COMMON``.
    """
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for number, part in enumerate(parts):
        new = TensorStorageMetadata(TensorProperties(part.dtype), torch.Size(part.shape), [])
        chunks, offsets = tensors.setdefault(part.key, new).chunks, torch.Size(part.offsets)
        places[MetadataIndex(part.key, offsets, len(chunks))] = _whole(folder, _name(number))
        chunks.append(ChunkStorageMetadata(offsets, torch.Size(part.sizes)))
    objects = dict.fromkeys(empty_objects)
    if COMMON in objects:
        objects[COMMON] = common
    else:
        _write(folder / COMMON_FILE, common)
    for name, found in (("none", None), ("common", common)):
        _write(folder / f"__0_{name}.distcp", [found])
    for key, found in objects.items():
        places[MetadataIndex(key)] = _whole(folder, f"__0_{'common' if found else 'none'}.distcp")
    stored: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {**tensors}
    stored |= {key: BytesStorageMetadata() for key in objects}
    with _replacing(folder / METADATA) as file:
        pickle.dump(Metadata(stored, None, places), file)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def _name(number: int) -> str:
    return f"__0_{number}.distcp"


def _whole(folder: Path, name: str) -> _StorageInfo:
    return _StorageInfo(name, 0, (folder / name).stat().st_size)


def _write(path: Path, found: Any) -> None:
    with _replacing(path) as file:
        torch.save(found, file)


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """All of the file or nothing."""
    partial = path.with_name(_PARTIAL)
    with partial.open("wb") as file:
        yield file
    partial.replace(path)
