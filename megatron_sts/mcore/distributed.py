"""Tensors in a folder of torch's distributed checkpoint format, whoever wrote it in whatever layout: read as data, part by part."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_sts.mcore.checkpoint import CheckpointError
from megatron_sts.mcore.cover import fault
from megatron_sts.mcore.reading import as_data, cause
from megatron_sts.runtime.plain import PlainDataError

_DAMAGE = (
    *(OSError, EOFError, RuntimeError, pickle.UnpicklingError),
    *(AssertionError, AttributeError, IndexError, KeyError, TypeError, ValueError),
)
"""What torch raises for files that are not what ``.metadata`` says."""


class DistributedTensors:
    """The tensors of one folder, by the names that its writer gave them. Reads no object, and opens files only to read a part."""

    def __init__(self, path: Path) -> None:
        """Reads ``.metadata``.

        Raises:
            CheckpointError: it cannot be read, or holds more than data.
        """
        self.path = path
        self._reader = FileSystemReader(path)
        try:
            with as_data():
                metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
            stored = metadata.state_dict_metadata.items()
            self._stored = {key: entry for key, entry in stored if isinstance(entry, TensorStorageMetadata)}
            self.objects = [key for key, entry in stored if isinstance(entry, BytesStorageMetadata)]
            self.shapes = {key: tuple(entry.size) for key, entry in self._stored.items()}
            self.dtypes = {key: entry.properties.dtype for key, entry in self._stored.items()}
        except PlainDataError as error:
            raise CheckpointError(str(error)) from error
        except _DAMAGE as error:
            raise CheckpointError(f"{path / '.metadata'} cannot be read: {cause(error)}") from error

    def check_parts(self, key: str) -> None:
        """That the stored parts of a tensor make it up, each element once: what none holds would be read as whatever memory held.

        Raises:
            CheckpointError: they do not.
        """
        try:
            parts = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in self._stored[key].chunks]
            wrong = fault(self.shapes[key], parts)
        except _DAMAGE as error:
            wrong = cause(error)
        if wrong is not None:
            raise CheckpointError(f"tensor {key} is not whole: {wrong}")

    def read(self, key: str, offsets: Sequence[int], sizes: Sequence[int]) -> torch.Tensor:
        """The box of ``sizes`` at ``offsets`` of a tensor; reads only the parts that hold some of it.

        Raises:
            CheckpointError: a file is missing, damaged, or holds more than data.
        """
        box = torch.empty(list(sizes), dtype=self.dtypes[key])
        wanted = ChunkStorageMetadata(torch.Size(offsets), box.shape)
        try:
            items = create_read_items_for_chunk_list(key, self._stored[key], [wanted])
            self._reader.read_data(LoadPlan(items), _Into(box)).wait()
        except _DAMAGE as error:
            raise CheckpointError(f"tensor {key} cannot be read: {cause(error)}") from error
        return box


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
