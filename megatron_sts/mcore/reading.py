"""Reading checkpoints as data. torch and megatron-core unpickle whatever stands in them, which may run code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PosixPath, PurePath
from typing import IO, Any, cast

import numpy as np
import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem, SavePlan

from megatron_sts.runtime import plain
from megatron_sts.runtime.plain import Names, PlainDataError

_DCP, _MCORE = "torch.distributed.checkpoint", "megatron.core.dist_checkpointing.strategies.torch"
_METADATA: Names = {
    **{
        (f"{_DCP}.metadata", name): None
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata"),
            *("BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
        )
    },
    **{(f"{_DCP}.planner", name): None for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")},
    (f"{_DCP}.filesystem", "_StorageInfo"): None,
    ("pathlib", "PosixPath"): None,
    ("pathlib._local", "PosixPath"): PosixPath,  # as Python 3.13 calls it
    ("torch", "Size"): None,
    ("torch.serialization", "_get_layout"): None,
    (_MCORE, "MCoreMetadata"): Metadata,  # as megatron-core before 0.16 calls them
    (_MCORE, "MCoreSavePlan"): SavePlan,
    **{("torch", name): None for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}
"""All that ``.metadata`` of the format names: where each tensor lies, and the plans that wrote them."""
_NUMPY_STATE: list[Any] = [np.ndarray, np.dtype, type(np.dtype("uint32")), np.empty(0).__reduce__()[0]]
"""Of NumPy's random state, beside what torch takes for plain."""


@contextmanager
def as_data() -> Iterator[None]:
    """Whatever checkpoint is read in this block is read without running anything that it names.

    Raises:
        PlainDataError: it names something that no checkpoint needs; in the form that torch gives to errors of a load.
    """
    ours = [(FileSystemReader, "read_metadata", _read_metadata), (DefaultLoadPlanner, "load_bytes", _load_bytes)]
    theirs = [(owner, name, getattr(owner, name)) for owner, name, _ in ours]
    try:
        for replaced in ours:
            setattr(*replaced)
        yield
    finally:
        for original in theirs:
            setattr(*original)


def _read_metadata(self: FileSystemReader, *_: Any, **options: Any) -> Metadata:
    """As the original, without ``pickle.load``."""
    path = self._get_metadata_path(options.get("rank"))
    with self.fs.create_stream(path, "rb") as file:
        try:
            metadata = plain.load(cast(IO[bytes], file), _METADATA)
        except PlainDataError as error:
            raise PlainDataError(f"{path} {error}") from error
    if not isinstance(metadata, Metadata):
        raise PlainDataError(f"{path} holds a {type(metadata).__name__}, no Metadata")
    for name in _files_of(metadata):
        if PurePath(name).name != name:
            raise PlainDataError(f"{path} names a file outside of its folder: {name}")
    metadata.storage_meta = metadata.storage_meta or StorageMeta()
    metadata.storage_meta.load_id = self.load_id
    return metadata


def _files_of(metadata: Metadata) -> set[str]:
    try:
        return {str(place.relative_path) for place in metadata.storage_data.values()}
    except AttributeError as error:
        raise PlainDataError(f".metadata does not say where its tensors are ({error})") from error


def _load_bytes(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
    """As the original, with ``weights_only``."""
    name = read_item.dest_index.fqn
    try:
        with torch.serialization.safe_globals([*_NUMPY_STATE, io.BytesIO]):
            found = torch.load(value, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise PlainDataError(f"its object {name} holds more than data, or is damaged: {cause(error)}") from error
    if self.flatten_state_dict:
        set_element(self.original_state_dict, self.mappings[name], found)
    else:
        self.state_dict[name] = found


def cause(error: Exception) -> str:
    """The one line of torch's page that says why a file was not read."""
    if isinstance(error, OSError):
        return str(error)
    said = [line.strip() for line in str(error).splitlines()] or [""]
    lines = [line for line in said if "GLOBAL" in line or "Unsupported" in line]
    return lines[0] if lines else f"{type(error).__name__}: {said[0]}"
