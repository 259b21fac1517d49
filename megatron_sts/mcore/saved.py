"""Whole weights out of a checkpoint of ours, one at a time, without the ranks or the model that wrote it."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from megatron_sts.mcore.checkpoint import check_whole
from megatron_sts.mcore.distributed import DistributedTensors
from megatron_sts.mcore.weights import unfused

_LAYERS = re.compile(r"^(?:language|vision\.encoder)\.decoder\.layers\.(?!\d)")
"""megatron-core stores each weight of all layers as one tensor, layers first."""
_MODEL = ("vision.", "qformer.", "projector.", "language.")


class SavedWeights:
    """The weights in a checkpoint's ``state`` folder, by their layout-free names."""

    def __init__(self, path: Path) -> None:
        """Checks the files, then reads the checkpoint's metadata; a collective of the ranks, if any.

        Raises:
            CheckpointError: a file is not as it was written, cannot be read, or holds more than data.
        """
        check_whole(path.parent)
        self.path = path
        self._tensors = DistributedTensors(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._places: dict[str, tuple[str, int | None]] = {}
        for key, shape in self._tensors.shapes.items():
            if key.startswith(_MODEL):
                self._add(key, shape)

    def _add(self, key: str, shape: tuple[int, ...]) -> None:
        match = _LAYERS.match(key)
        for layer in range(shape[0]) if match else [None]:
            name = key if match is None else unfused(f"{match[0]}{layer}.{key[match.end() :]}")
            self.shapes[name] = shape if layer is None else shape[1:]
            self.dtypes[name] = self._tensors.dtypes[key]
            self._places[name] = key, layer

    def read(self, name: str) -> torch.Tensor:
        """One whole weight; reads only the pieces that hold it."""
        shape = self.shapes[name]
        return self._read(name, [0] * len(shape), list(shape))

    def read_ranges(self, name: str, dim: int, ranges: list[tuple[int, int]]) -> torch.Tensor:
        """The given [start, stop) pieces of a weight along ``dim``, joined along it."""
        pieces = []
        for start, stop in ranges:
            offsets, size = [0] * len(self.shapes[name]), list(self.shapes[name])
            offsets[dim], size[dim] = start, stop - start
            pieces.append(self._read(name, offsets, size))
        return torch.cat(pieces, dim=dim)

    def _read(self, name: str, offsets: list[int], size: list[int]) -> torch.Tensor:
        key, layer = self._places[name]
        lead = [] if layer is None else [layer]
        return self._tensors.read(key, lead + offsets, [1] * len(lead) + size).reshape(size)
