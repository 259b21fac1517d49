"""Whole tensors in safetensors files: one file, or a folder of shards with an index. Reads only what is asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_sts.config.errors import ConfigError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class StoredTensors:
    """The tensors of a safetensors file, or of a folder in Hugging Face's form. Holds names and shapes, no file open."""

    def __init__(self, path: Path) -> None:
        """Reads the headers.

        Raises:
            ConfigError: there are no such files, or they are damaged.
        """
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._files: dict[str, Path] = {}
        for file in _files_of(path):
            with _opened(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118  # not a dict
                    piece = tensors.get_slice(name)
                    self.shapes[name] = tuple(piece.get_shape())
                    self.dtypes[name] = _dtype(piece)
                    self._files[name] = file

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor, in memory of its own."""
        with _opened(self._files[name]) as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor

    def read_ranges(self, name: str, dim: int, ranges: list[tuple[int, int]]) -> torch.Tensor:
        """The given [start, stop) pieces along ``dim``, joined along it."""
        with _opened(self._files[name]) as tensors:
            piece = tensors.get_slice(name)
            lead = (slice(None),) * dim
            return torch.cat([piece[(*lead, slice(*bounds))] for bounds in ranges], dim=dim)


def _files_of(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not (path / INDEX).is_file():
        if not (path / SINGLE).is_file():
            remedy = "give a folder of safetensors weights"
            if any(path.glob("*.bin")):
                remedy = "its *.bin are not read: load it with transformers and save_pretrained it"
            raise ConfigError(f"{path}: holds neither {INDEX} nor {SINGLE}; {remedy}")
        return [path / SINGLE]
    try:
        names = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        files = [path / name for name in sorted(set(names))]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{path / INDEX}: damaged ({error}); fetch or convert the weights again") from None
    for file in files:
        if not file.is_file():
            raise ConfigError(f"{file}: missing, but {INDEX} names it; fetch or convert the weights again")
    return files


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ConfigError(f"{file}: damaged ({error}); fetch or convert the weights again") from None


def _dtype(piece: Any) -> torch.dtype:
    """Of a safetensors slice; its first element says it in torch's terms."""
    first: torch.Tensor = piece[tuple(slice(0, 1) for _ in piece.get_shape())] if piece.get_shape() else piece[...]
    return first.dtype
