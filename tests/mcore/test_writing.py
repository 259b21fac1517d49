"""A checkpoint of the same parts as the one before needs no second look at what all ranks write, and is the same on disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata

from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import checkpoint, groups
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.stage import Stage, build_stage
from megatron_sts.train.step import train_step
from tests.dist.ladder import DENSE, resolved_run, write_samples, written_run
from tests.dist.launch import run_ranks


def save_thrice() -> None:
    """Twice the same parts, then other ones (the optimizer's are left out), of which the first rank has to hear."""
    folder = Path(os.environ["FOLDER"])
    num_gathered = 0
    gather = dist.gather_object

    def counted(*args: Any, **options: Any) -> None:
        nonlocal num_gathered
        num_gathered += 1
        gather(*args, **options)

    with process_group(60.0):
        written = written_run(folder, DENSE, data_parallel_size=2, use_distributed_optimizer=True)
        resolved = resolved_run(written, 2)
        place, gate = groups.initialize(resolved.config.parallel, seed=1), SkipGate()
        stage = build_stage(resolved, resolved.stages[0], place, build_model(resolved, gate), gate)
        dist.gather_object = counted
        saved = []
        for number, gathers in enumerate((1, 1)):
            train_step(stage, number)
            saved.append(save(stage, folder / f"{number}"))
            assert num_gathered == gathers, number
        first, second = saved
        assert first.state_dict_metadata == second.state_dict_metadata and len(first.state_dict_metadata) > 9
        assert first.storage_data.keys() == second.storage_data.keys()
        for chunk in stage.chunks:
            chunk.requires_grad_(False)
        assert save(stage, folder / "other").state_dict_metadata.keys() < first.state_dict_metadata.keys()
        assert num_gathered == 2
        dist.gather_object = gather


def save(stage: Stage, path: Path) -> Metadata:
    if dist.get_rank() == 0:
        path.mkdir()
    dist.barrier()
    snapshot = checkpoint.snapshot(path, stage.chunks, stage.optimizer, {})
    places: list[Any] = [None, None]
    dist.all_gather_object(places, snapshot.write().places)
    if dist.get_rank() == 0:
        snapshot.finish(places)
    dist.barrier()
    metadata = FileSystemReader(path).read_metadata()
    assert not hasattr(metadata, "all_local_plans")
    # Each part that the table of contents has lies somewhere.
    parts = [
        (name, chunk.offsets)
        for name, of in metadata.state_dict_metadata.items()
        for chunk in getattr(of, "chunks", ())
    ]
    assert {(index.fqn, index.offset) for index in metadata.storage_data if index.offset is not None} == set(parts)
    return metadata


@pytest.mark.timeout(200)
def test_the_same_parts_are_gathered_once(tmp_path: Path) -> None:
    write_samples(tmp_path)
    run_ranks(save_thrice, 2, 150, FOLDER=tmp_path)
