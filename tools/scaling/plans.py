"""What a checkpoint's plan costs the first rank, with the plans of all the others made up from those of one rank a pipeline stage.

The first rank's own code runs, under a fake process group: ``megatron_sts.mcore.checkpoint.snapshot`` and ``Snapshot.finish``. What
it would gather is handed to it: of each pipeline stage the first rank is built too; what its other data-parallel ranks write are
the ranges that megatron-core's buffers give them; and those of the other tensor-parallel ranks are these with offsets moved.
"""

from __future__ import annotations

import pickle
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.dry.batches import PlannedBatches
from megatron_sts.dry.run import rank_of_stage
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import checkpoint, groups
from megatron_sts.mcore.meta import meta_rank, replaced
from megatron_sts.mcore.reading import as_data
from megatron_sts.mcore.shards import sharded_param_state
from megatron_sts.model.init import build_model
from megatron_sts.train.stage import Stage, build_stage


@dataclass(frozen=True)
class PlanCost:
    """Of one checkpoint, on the first rank."""

    num_items: int
    """Tensors' parts and objects that all ranks write."""
    own_plan_s: float
    own_plan_bytes: int
    gathered_bytes: int
    """torch pads what each rank sends to the longest."""
    global_plan_s: float
    """To unpickle all plans, look that they cover each tensor once, and make the table of contents of them."""
    global_plan_rss_bytes: int
    """By how much the process grew for that."""
    finish_s: float
    metadata_bytes: int
    read_s: float
    """What each rank takes to read the table of contents when it goes on from the checkpoint."""
    read_rss_bytes: int


def plan_cost(resolved: Resolved, stage_name: str, folder: Path) -> PlanCost:
    """Plans a checkpoint of the stage into ``folder``, an empty one, as the first of the run's ranks."""
    spec, others = resolved.stage(stage_name), plans_of_all(resolved, stage_name)
    found: dict[str, float] = {}

    def gather(obj: SavePlan, object_gather_list: list[Any], **_: Any) -> None:
        began = time.process_time()
        own_blob = pickle.dumps(obj)
        if odd := {item.index for item in obj.items} ^ {item.index for item in pickle.loads(others[0]).items}:
            raise AssertionError(f"the first rank's plan is not as it was made up: {odd}")
        found.update(own_bytes=len(own_blob), largest_bytes=max(len(own_blob), *map(len, others)))
        found.update(rss=_rss_bytes(), began=time.process_time(), skipped=time.process_time() - began)
        object_gather_list[:] = [obj, *(pickle.loads(blob) for blob in others[1:])]
        found["num_items"] = sum(len(plan.items) for plan in object_gather_list)

    with stage_of(resolved, spec, 0) as stage, replaced(dist, "gather_object", gather):
        began = time.process_time()
        snapshot = checkpoint.snapshot(folder, stage.chunks, stage.optimizer, {})
        ended = time.process_time()
        own_plan_s, global_plan_s = found["began"] - began - found["skipped"], ended - found["began"]
        grown_bytes = _peak_rss_bytes() - found["rss"]
        places = [_places(pickle.loads(blob), rank) for rank, blob in enumerate(others)]
        others.clear()
        began = time.process_time()
        snapshot.finish(places)
        finish_s = time.process_time() - began
    del places, snapshot
    read_s, read_bytes = _read(folder)
    return PlanCost(
        num_items=int(found["num_items"]),
        own_plan_s=own_plan_s,
        own_plan_bytes=int(found["own_bytes"]),
        gathered_bytes=int(found["largest_bytes"]) * resolved.world_size,
        global_plan_s=global_plan_s,
        global_plan_rss_bytes=int(grown_bytes),
        finish_s=finish_s,
        metadata_bytes=(folder / ".metadata").stat().st_size,
        read_s=read_s,
        read_rss_bytes=read_bytes,
    )


@contextmanager
def stage_of(resolved: Resolved, spec: ResolvedStage, rank: int) -> Iterator[Stage]:
    """The stage as ``rank`` of a fake world holds it, on meta tensors."""
    with meta_rank(rank, resolved.world_size):
        place, gate = groups.initialize(resolved.config.parallel, resolved.config.seed), SkipGate()
        with torch.device("meta"):
            chunks = build_model(resolved, gate, load_init=False)
        yield build_stage(resolved, spec, place, chunks, gate, PlannedBatches(resolved, spec, place))


def plans_of_all(resolved: Resolved, stage_name: str) -> list[bytes]:
    """Each rank's plan, pickled, in the order of ranks."""
    spec, parallel = resolved.stage(stage_name), resolved.config.parallel
    plans: list[bytes] = []
    for pp_rank in range(parallel.pipeline_model_parallel_size):
        with stage_of(resolved, spec, rank_of_stage(resolved, pp_rank)) as stage:
            state = checkpoint._sharded_state(stage.chunks, stage.optimizer, is_loading=False)
            pieces = [_pieces(stage, state, dp_rank) for dp_rank in range(1, resolved.data_parallel_size)]
            sharded, _common = save_preprocess(state, validate_access_integrity=False)
            axes = dict(_tensor_parallel_axes(sharded))
            for held in (sharded, *pieces):
                items = _items(held)
                for tp_rank in range(parallel.tensor_model_parallel_size):
                    moved = items if tp_rank == 0 else list(_moved(items, axes, tp_rank))
                    objects = list(_objects(len(plans), resolved.world_size))
                    plans.append(pickle.dumps(SavePlan([*moved, *objects])))
    return plans


def _pieces(stage: Stage, state: dict[str, Any], dp_rank: int) -> dict[str, ShardedTensor]:
    """What another data-parallel rank writes of the optimizer's state: the weights themselves are the first one's."""
    optimizer = stage.optimizer.optimizer
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    found: list[ShardedTensor] = []
    for part in parts:
        ranges = []
        for buffer in part.buffers:
            peer = SimpleNamespace(rank=lambda: dp_rank, size=buffer.data_parallel_group.size)
            with replaced(buffer, "data_parallel_group", peer):
                ranges.append(DistributedOptimizer._build_gbuf_range_map(buffer))
        lengths = {
            weight: found["param"].size
            for buffer in ranges
            for of_type in buffer.values()
            for bucket in of_type
            for weight, found in bucket["param_map"].items()
        }
        held = SimpleNamespace(
            gbuf_ranges=ranges,
            _get_main_param_and_optimizer_states=lambda weight, lengths=lengths: {
                name: torch.empty(lengths[weight], dtype=torch.float32, device="meta")
                for name in ("param", "exp_avg", "exp_avg_sq")
            },
        )
        found += sharded_param_state(held, {name: value for name, value in state.items() if name.startswith("model")})  # type: ignore[arg-type]
    return {f"piece{number}": piece for number, piece in enumerate(found)}


def _items(sharded: dict[str, Any]) -> list[WriteItem]:
    """What megatron-core's planner makes of a rank's sharded state."""
    named, *_ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(named, False), is_coordinator=False)
    return planner.create_local_plan().items


def _objects(rank: int, world_size: int) -> Iterator[WriteItem]:
    """Those that do not belong to the model."""
    names = [ShardedObject("rng", None, (world_size,), (rank,)).unique_key]
    if rank == 0:
        names.append(ShardedObject("common_state", None, (1,), (0,)).unique_key)
    yield from (WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO) for name in names)


def _tensor_parallel_axes(sharded: dict[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    """For each weight that is split: its axis, and how far the next tensor-parallel rank's part lies."""
    for value in nested_values(sharded):
        if isinstance(value, ShardedTensor) and value.axis_fragmentations is not None:
            own = range(value.prepend_axis_num, len(value.global_shape))
            split = next((axis for axis in own if value.axis_fragmentations[axis] > 1), None)
            if split is not None:
                yield value.key, (split, value.local_shape[split - value.prepend_axis_num])


def _moved(items: list[WriteItem], axes: dict[str, tuple[int, int]], tp_rank: int) -> Iterator[WriteItem]:
    """The items of another tensor-parallel rank. What all hold whole the first one writes."""
    for item in items:
        name = item.index.fqn
        weight = name.split(".", 3)[3] if name.startswith("optimizer.state.") else name
        if weight not in axes or item.tensor_data is None:
            continue
        axis, stride = axes[weight]
        offsets = list(item.tensor_data.chunk.offsets)
        offsets[axis] += tp_rank * stride
        moved = torch.Size(offsets)
        data = replace(item.tensor_data, chunk=replace(item.tensor_data.chunk, offsets=moved))
        yield replace(item, index=replace(item.index, offset=moved), tensor_data=data)


def _places(plan: SavePlan, rank: int) -> list[WriteResult]:
    """What a rank tells of where it has written its items."""
    file = f"__{rank}_0.distcp"
    return [
        WriteResult(item.index, 1, _StorageInfo(file, 1024 * number, 1024)) for number, item in enumerate(plan.items)
    ]


def _read(folder: Path) -> tuple[float, int]:
    before, began = _rss_bytes(), time.process_time()
    with as_data():
        metadata = FileSystemReader(folder).read_metadata()
    took_s, after = time.process_time() - began, _rss_bytes()
    del metadata
    return took_s, max(0, after - before)


def _rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
