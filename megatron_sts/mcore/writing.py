"""Writing sharded checkpoints in three parts: what needs all ranks, what each does alone, and what the first does for all.

megatron-core's writer starts a process (a Manager) that outlives a killed rank and dies of the step's signals, logs the cause of a
failed write and hands on another, and leaves the other ranks waiting when only the first one fails. So of megatron-core there are
the plan and the format here, not the writing.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StoragePrefix, _write_item
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_sts.mcore.cover import fault
from megatron_sts.runtime.device import current_device
from megatron_sts.runtime.dist import any_rank
from megatron_sts.runtime.integrity import digest_of, digested

FILES = ("metadata.json", ".metadata")
"""What the first rank writes for all, in megatron-core's format."""


@dataclass(frozen=True)
class Written:
    """What a rank has written."""

    places: list[WriteResult]
    """Where in its file each tensor and object is."""
    digests: dict[str, str]
    """Of its files, by name."""


class HostCopies:
    """Memory into which tensors are copied, so that training may change them while they are written. It is kept from one
    checkpoint to the next: to allocate it, page by page, takes longer than to fill it.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.Size | None], torch.Tensor] = {}

    def take(self, item: WriteItem, tensor: torch.Tensor) -> torch.Tensor:
        """A copy, which is there once the device has been waited for."""
        key = item.index.fqn, item.index.offset
        tensor = _plain(tensor)
        kept = self._kept.get(key)
        if kept is None or (kept.shape, kept.dtype) != (tensor.shape, tensor.dtype):
            kept = self._kept[key] = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda
            )
        return kept.copy_(tensor, non_blocking=True)

    def clear(self) -> None:
        """Gives the memory back."""
        self._kept.clear()


class Snapshot:
    """This rank's part of a checkpoint. Until it is written or copied, training must not go on."""

    def __init__(self, path: Path, writer: _Writer, metadata: Metadata | None) -> None:
        self._path, self._writer, self._metadata = path, writer, metadata

    def copy(self, copies: HostCopies) -> None:
        """Takes the tensors as they are now; training may go on. What ``copies`` held before is overwritten."""
        self._writer.items = [
            (item, copies.take(item, data) if isinstance(data, torch.Tensor) else data)
            for item, data in self._writer.items
        ]
        current_device().synchronize()

    def write(self) -> Written:
        """Writes this rank's file; no collective. In any thread, once it is copied.

        Raises:
            OSError: the disk takes no more.
        """
        if not self._writer.items:
            return Written([], {})
        name = f"__{torch.distributed.get_rank()}_0.distcp"
        with digested(self._path / name) as file:
            places = [
                _write_item(self._writer.transforms, file, _on_host(data), item, name, SerializationFormat.TORCH_SAVE)
                for item, data in self._writer.items
            ]
        return Written(places, {name: file.digest})

    def finish(self, places: list[list[WriteResult]]) -> dict[str, str]:
        """Writes what the format has once, from all ranks' places; on the first rank only. Digests of these files.

        Raises:
            OSError: the disk takes no more.
        """
        assert self._metadata is not None, "only the first rank has it"
        self._writer.finish(self._metadata, places)
        save_config(CheckpointingConfig("torch_dist", 1), str(self._path))
        return {name: digest_of(self._path / name) for name in FILES}


def plan(path: Path, state: dict[str, Any], content_metadata: dict[str, Any]) -> Snapshot:
    """Agrees on which rank writes what of a sharded state; a collective. ``path`` must be an empty folder.

    megatron-core would also hand every rank the list of what all of them write (gigabytes from thousands of ranks), for the first
    one to look whether it covers each tensor once. Here the first rank alone gathers plans, and looks at that in them.
    """
    strategy = _Plan()
    dist_checkpointing.save(
        state,
        str(path),
        strategy,
        validate_access_integrity=False,
        content_metadata=content_metadata,
        async_sharded_save=True,
        async_strategy="mcore",
    )
    return Snapshot(path, strategy.writer, strategy.metadata)


class _Plan(TorchDistSaveShardedStrategy):
    """Stops where megatron-core would begin to write."""

    writer: _Writer
    metadata: Metadata | None
    _last: tuple[list[Any], Metadata | None] | None = None
    """What this rank wrote of the last checkpoint and, on the first rank, what all did: for every instance."""

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Any, async_strategy: str = "mcore") -> AsyncRequest:
        """Plans. Most checkpoints have the parts of the one before; the first rank need not gather and look at those of thousands again."""
        state, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        planner = _Planner(dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False)
        tensors, writer = mcore_to_pyt_state_dict(state, False), _Writer(checkpoint_dir)
        planner.set_up_planner(tensors, is_coordinator=torch.distributed.get_rank() == 0)
        own = planner.create_local_plan()
        parts = [(item.index, item.type, item.tensor_data) for item in own.items]  # an object's size may change
        last = _Plan._last
        is_known = not any_rank(last is None or last[0] != parts)
        known = (own, own, True) if is_known else None
        found, *_ = save_state_dict_async_plan(tensors, writer, planner=planner, cached_ckpt_structure=known)
        self.writer, self.metadata, _ = found
        if is_known:
            assert last is not None
            self.metadata = copy.copy(last[1])
        elif self.metadata is not None:
            vars(self.metadata).pop("all_local_plans")  # megatron-core would store them too, and nobody reads them here
        _Plan._last = parts, copy.copy(self.metadata)
        return AsyncRequest(None, (), [])


class _Planner(MCoreSavePlanner):
    def _create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """As the original, with a look at the parts that thousands of ranks do not make long."""
        plans, metadata = create_default_global_save_plan(self._dedup_save_plans(all_plans))
        for name, tensor in metadata.state_dict_metadata.items():
            if isinstance(tensor, TensorStorageMetadata) and tensor.size:
                parts = [(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in tensor.chunks]
                if (wrong := fault(tuple(tensor.size), parts)) is not None:
                    raise ValueError(f"the ranks' parts of {name} are no checkpoint: {wrong}")
        return plans, metadata


class _Writer(FileSystemWriter):
    """Keeps what is to be written."""

    can_run_decentralized_global_plan = True
    items: list[tuple[WriteItem, Any]]

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Makes no folder: what can fail on one rank alone has no place in a plan."""
        return plan

    def prepare_decentralized_global_plan(self, plan: SavePlan) -> SavePlan:
        """Files are named by rank."""
        return dataclasses.replace(plan, storage_data=_StoragePrefix(f"__{torch.distributed.get_rank()}_"))

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Only notes the data, bytes first as megatron-core has them."""
        items = sorted(plan.items, key=lambda item: item.type != WriteItemType.BYTE_IO)
        self.items = [(item, planner.resolve_data(item)) for item in items]


def _on_host(data: Any) -> Any:
    """A tensor whose memory holds nothing else, for torch saves the whole of it; anything else as it is."""
    if not isinstance(data, torch.Tensor):
        return data
    data = _plain(data)
    is_view = data.untyped_storage().nbytes() != data.numel() * data.itemsize
    return data.clone() if data.is_cpu and is_view else data.cpu()


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Without gradients, and FP8 of Transformer Engine as what it stands for."""
    tensor = tensor.detach()
    found: torch.Tensor = tensor.dequantize() if "dequantize" in type(tensor).__dict__ else tensor
    return found
