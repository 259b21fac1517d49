"""Whole weights out of a checkpoint, one at a time, without the ranks or the model that wrote it."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_sts.mcore.checkpoint import CheckpointError, check_whole
from megatron_sts.mcore.reading import as_data
from megatron_sts.mcore.weights import unfused
from megatron_sts.runtime.plain import PlainDataError

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
        self._reader = FileSystemReader(path)
        try:
            with as_data():
                metadata = self._reader.read_metadata()
        except (OSError, PlainDataError) as error:
            raise CheckpointError(str(error)) from error
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._places: dict[str, tuple[str, TensorStorageMetadata, int | None]] = {}
        for key, stored in metadata.state_dict_metadata.items():
            if key.startswith(_MODEL) and isinstance(stored, TensorStorageMetadata):
                self._add(key, stored)

    def _add(self, key: str, stored: TensorStorageMetadata) -> None:
        size = tuple(stored.size)
        match = _LAYERS.match(key)
        for layer in range(size[0]) if match else [None]:
            name = key if match is None else unfused(f"{match[0]}{layer}.{key[match.end() :]}")
            self.shapes[name] = size if layer is None else size[1:]
            self.dtypes[name] = stored.properties.dtype
            self._places[name] = key, stored, layer

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
        key, stored, layer = self._places[name]
        lead = [] if layer is None else [layer]
        whole = torch.empty([1] * len(lead) + size, dtype=self.dtypes[name])
        wanted = ChunkStorageMetadata(torch.Size(lead + offsets), whole.shape)
        items = create_read_items_for_chunk_list(key, stored, [wanted])
        self._reader.read_data(LoadPlan(items), _Into(whole)).wait()
        return whole.reshape(size)


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor."""

    def __init__(self, whole: torch.Tensor) -> None:
        super().__init__()
        self._whole = whole

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        pieces = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._whole[tuple(slice(start, start + length) for start, length in pieces)]

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Nothing is left to do: the tensor is a view."""
