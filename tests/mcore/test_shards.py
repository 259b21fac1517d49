"""A rank's part of the optimizer's state in a checkpoint: boxes of a range, and who writes what."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import checkpoint, groups
from megatron_sts.mcore.shards import boxes, sharded_param_state
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.stage import build_stage
from megatron_sts.train.step import train_step
from tests.dist.ladder import DENSE, Written, resolved_run, write_samples, written_run
from tests.dist.launch import run_ranks


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_are_the_range_in_order(shape: list[int], data: st.DataObject) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    end = data.draw(st.integers(start, numel))
    numbers = np.arange(numel).reshape(shape)
    found = list(boxes(shape, start, end))
    assert all(len(box.offset) == len(box.shape) == len(shape) for box in found)
    parts = [
        numbers[tuple(slice(a, a + n) for a, n in zip(box.offset, box.shape, strict=True))].ravel() for box in found
    ]
    assert np.concatenate([np.empty(0, int), *parts]).tolist() == list(range(start, end))
    assert len(found) <= 2 * len(shape) - 1


PP, VPP = "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
RUNS: dict[int, list[Written]] = {
    2: [{}, {"params": "bf16", "model": "siglip"}],
    4: [{"tensor_model_parallel_size": 2, "model": "qformer"}, {PP: 2, VPP: 2, "model": "tied"}],
}
"""Options of ``written_run``, by number of ranks."""


def compare_with_gather() -> None:
    """On each rank: what it writes, beside what megatron-core would have after its gather."""
    folder, num_ranks = Path(os.environ["FOLDER"]), int(os.environ["WORLD_SIZE"])
    with process_group(60.0):
        for options in RUNS[num_ranks]:
            written = written_run(folder, DENSE, data_parallel_size=2, use_distributed_optimizer=True, **options)
            resolved = resolved_run(written, num_ranks)
            place, gate = groups.initialize(resolved.config.parallel, seed=1), SkipGate()
            stage = build_stage(resolved, resolved.stages[0], place, build_model(resolved, gate), gate)
            train_step(stage, 0)
            (part,) = stage.optimizer._update.parts()
            model = checkpoint._sharded_model(stage.chunks)
            mine = list(sharded_param_state(part, model))
            theirs = part.sharded_param_state_fully_reshardable(model, False, checkpoint._metadata())
            apply_factories(theirs)
            found, expected = joined(mine), joined(nested_values(theirs))
            assert found.keys() == expected.keys() and len(found) > 9
            for name, tensor in found.items():
                assert not tensor.isnan().any(), f"{name} is not written whole"
                assert torch.equal(tensor, expected[name]), name
            held = [sum(piece.data.numel() for piece in mine), sum(t.data.numel() for t in nested_values(theirs))]
            assert held[0] < 0.6 * held[1], "a rank writes its own half only"
            stage.close()
            del stage
            groups.destroy()


def joined(pieces: Any) -> dict[str, torch.Tensor]:
    """The tensors that all ranks write together, NaN where none does; each element by one rank, and once."""
    kept = [piece for piece in pieces if is_main_replica(piece.replica_id)]
    told: list[list[ShardedTensor]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(told, kept)
    found: dict[str, torch.Tensor] = {}
    for piece in (piece for rank in told for piece in rank):
        whole = found.setdefault(piece.key, torch.full(piece.global_shape, torch.nan))
        part = whole[piece.global_slice()]
        assert part.isnan().all(), f"{piece.key} is written twice"
        part.copy_(piece.data.detach())
    return found


@pytest.mark.timeout(200)
@pytest.mark.parametrize("num_ranks", RUNS)
def test_ranks_write_what_a_gather_would(tmp_path: Path, num_ranks: int) -> None:
    write_samples(tmp_path)
    run_ranks(compare_with_gather, num_ranks, 150, FOLDER=tmp_path)
