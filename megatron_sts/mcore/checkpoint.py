"""Sharded checkpoints of model, optimizer and random states through ``megatron.core.dist_checkpointing``."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from megatron_sts.mcore import groups
from megatron_sts.mcore.module import unwrap
from megatron_sts.mcore.optim import StageOptimizer
from megatron_sts.mcore.reading import as_data
from megatron_sts.mcore.shards import sharded_param_state
from megatron_sts.mcore.writing import Snapshot, plan
from megatron_sts.runtime import integrity
from megatron_sts.runtime.dist import first_cause
from megatron_sts.runtime.integrity import UnreadableError
from megatron_sts.runtime.plain import PlainDataError


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read. The message is the cause alone."""


def snapshot(
    path: Path, chunks: Sequence[torch.nn.Module], optimizer: StageOptimizer, common: dict[str, Any]
) -> Snapshot:
    """Everything needed to go on, for this rank to write into ``path``, an empty folder; a collective over all ranks.

    ``common`` is stored once, as plain Python values. The tensors are those that training goes on to change.
    """
    optimizer.gather_params()
    optimizer.set_adam_steps(common=True)
    try:
        state = _sharded_state(chunks, optimizer, is_loading=False)
        state["rng"] = _sharded_rng()
        state["common"] = {**common, **_counters(optimizer)}
        content = {name: value for name, value in _metadata().items() if name != "dp_cp_group"}
        return plan(path, state, content)
    finally:
        optimizer.set_adam_steps()


def load(path: Path, chunks: Sequence[torch.nn.Module], optimizer: StageOptimizer) -> dict[str, Any]:
    """Restores what a ``snapshot`` holds and returns ``common``; a collective over all ranks. ``common["lr"]`` is the learning rate
    with which the stage would have gone on, had it not become longer.

    Whether its files are whole is for the caller to check. Another layout may load it. Random states have no meaning there, and stay as the seed made them.

    Raises:
        CheckpointError: it cannot be read, or holds more than data.
    """
    with _shared_causes():
        _look_at(path)
        common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(path))["common"]
    is_same_layout = [*common["layout"], 1][:4] == _layout()  # checkpoints from before context parallelism have three
    state = _sharded_state(chunks, optimizer, is_loading=True)
    if is_same_layout:
        state["rng"] = _sharded_rng()
    with _shared_causes():
        loaded = dist_checkpointing.load(state, str(path))
    _load_model(chunks, loaded)
    if "optimizer" in state:
        with torch.no_grad():
            optimizer.optimizer.load_state_dict(loaded["optimizer"])
    optimizer.num_updates, optimizer.num_layer_updates = common["num_updates"], common["num_layer_updates"]
    common["lr"] = optimizer.load_schedule(common["scheduler"])
    optimizer.set_adam_steps()
    if is_same_layout:
        _restore_rng(loaded["rng"])
    return common


def load_model(path: Path, chunks: Sequence[torch.nn.Module]) -> None:
    """Restores weights only, from files that are whole; a collective over all ranks. Any layout.

    Raises:
        CheckpointError: a file is not as it was written, cannot be read, or holds more than data.
    """
    check_whole(path.parent)
    with _shared_causes():
        _look_at(path)
    with _shared_causes():
        loaded = dist_checkpointing.load(_sharded_model(chunks), str(path))
    _load_model(chunks, loaded)


def _look_at(path: Path) -> None:
    """What torch would refuse with a traceback and other words is refused here; no collective."""
    FileSystemReader(path).read_metadata()


def check_whole(checkpoint: Path) -> None:
    """Refuses a checkpoint whose files are not as they were written; a collective of the process group, if there is one.

    Raises:
        CheckpointError: it is so, or nobody can tell.
    """
    try:
        damage = integrity.check(checkpoint)
    except UnreadableError as error:
        raise CheckpointError(str(error)) from error
    if damage is not None:
        raise CheckpointError(damage)


@contextmanager
def _shared_causes() -> Iterator[None]:
    """Reads as data, and what fails on one rank fails on all of them with that cause; ends in a collective."""
    cause = None
    try:
        with as_data():
            yield
    except CheckpointException as error:  # a BaseException with tracebacks for a text
        cause = "; ".join(str(failed) for failed, _trace in error.failures.values())
    except (CheckpointingException, OSError, PlainDataError) as error:
        cause = str(error)
    if (known := first_cause(cause)) is not None:
        raise CheckpointError(known)


def _load_model(chunks: Sequence[torch.nn.Module], loaded: dict[str, Any]) -> None:
    for index, chunk in enumerate(chunks):
        unwrap(chunk).load_state_dict(loaded.get(f"model{index}", {}), strict=True)  # none: no layers


def _sharded_model(chunks: Sequence[torch.nn.Module]) -> dict[str, Any]:
    return {
        f"model{i}": unwrap(chunk).sharded_state_dict(prefix="", metadata=_metadata()) for i, chunk in enumerate(chunks)
    }


def _sharded_state(chunks: Sequence[torch.nn.Module], optimizer: StageOptimizer, *, is_loading: bool) -> dict[str, Any]:
    state = _sharded_model(chunks)
    # A pipeline rank on which nothing trains has no optimizer state; all its data-parallel copies agree on that.
    if any(parameter.requires_grad for chunk in chunks for parameter in chunk.parameters()):
        state["optimizer"] = optimizer.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=_metadata())
    return state


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _counters(optimizer: StageOptimizer) -> dict[str, Any]:
    return {
        "layout": _layout(),
        "num_updates": optimizer.num_updates,
        "num_layer_updates": optimizer.num_layer_updates,
        "scheduler": optimizer.scheduler.state_dict(),
    }


def _layout() -> list[int]:
    here = groups.place()
    return [here.tp_size, here.pp_size, here.dp_size, here.cp_size]


def _sharded_rng() -> ShardedObject:
    """Each rank's random states, one object a rank."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    return ShardedObject("rng", states, (world_size,), (rank,), replica_id=0)


def _restore_rng(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.cuda.set_rng_state(states["device"])
    torch.set_rng_state(states["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(states["tracker"])


def _ignore_saved_step() -> None:
    """megatron-core asks the loaded state for a tensor ``step`` that the checkpoint does not hold; ours is set above."""
    original = DistributedOptimizer._set_main_param_and_optimizer_states

    def without_step(self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
        original(self, model_param, {**tensors, "step": None})

    DistributedOptimizer._set_main_param_and_optimizer_states = without_step


def _write_shards_as_they_are() -> None:
    """In place of a gather of all data-parallel ranks' shards and a sweep for garbage, for which training would wait."""
    original = DistributedOptimizer.sharded_state_dict

    def without_gather(
        self: DistributedOptimizer, model_state: dict[str, Any], is_loading: bool = False, *, metadata: dict[str, Any]
    ) -> dict[str, Any]:
        if is_loading:
            loading: dict[str, Any] = original(self, model_state, is_loading, metadata=metadata)
            return loading
        pieces = {f"piece{i}": piece for i, piece in enumerate(sharded_param_state(self, model_state))}
        kind = metadata["distrib_optim_sharding_type"]
        return {**self.state_dict(), "param_state": pieces, "param_state_sharding_type": kind}

    DistributedOptimizer.sharded_state_dict = without_gather


_ignore_saved_step()
_write_shards_as_they_are()
