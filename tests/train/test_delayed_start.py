"""With delayed scaling the first micro-batch of a process runs every layer, on all ranks in the same order.

Without a GPU megatron-core's FP8 contexts do nothing, so what trains here is fp32; modules with FP8's mark stand for FP8's.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask
from megatron_sts.mcore import groups, specs
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.stage import build_stage
from megatron_sts.train.step import StepResult, train_step
from tests.dist.ladder import BATCH, Written, resolved_run, write_samples, written_run
from tests.dist.launch import RanksFailed, run_ranks

LDS = {"sampler": "fixed", "fixed_layers": [1, 2]}
ALL, SKIPPED = (False,) * 4, (False, True, True, False)


class MarkedColumn(ColumnParallelLinear):
    is_first_microbatch = True


class MarkedRow(RowParallelLinear):
    is_first_microbatch = True


def config(folder: Path, fp8: str, **layout: Any) -> Written:
    stage = {"name": "one", "freeze": ["vision"], "steps": 4, "batch": {**BATCH, "sequence_length": 96}, "lds": LDS}
    written = written_run(folder, stage, {**stage, "name": "two"}, model="aligned", **layout)
    return {**written, "precision": {"fp8": fp8}}


def first_steps(written: Written, world_size: int = 1) -> list[StepResult]:
    """Two steps of each of two stages; the second begins at a step in the middle, as after a restart."""
    resolved = resolved_run(written, world_size)
    place = groups.initialize(resolved.config.parallel, resolved.config.seed)
    gate, results = SkipGate(), []
    chunks = build_model(resolved, gate)
    for spec, start in zip(resolved.stages, (2, 0), strict=True):
        stage = build_stage(resolved, spec, place, chunks, gate)
        results += [train_step(stage, start), train_step(stage, start + 1)]
        stage.close()
    groups.destroy()
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("delayed")
    write_samples(path)
    return path


@pytest.mark.parametrize("fp8", ["delayed", "tensorwise"])
def test_the_first_micro_batch_runs_all_layers(folder: Path, fp8: str) -> None:
    with process_group(60.0):
        first, *others = first_steps(config(folder, fp8))
    if fp8 == "delayed":
        assert first.mask.rows == (ALL, SKIPPED, SKIPPED, SKIPPED)
        assert first.layer_runs == (4, 1, 1, 4)
    else:
        assert first.mask.rows == (SKIPPED,)
    assert all(result.mask.rows == (SKIPPED,) for result in others)


def two_ranks_start() -> None:
    """In a rank: trains; with STRAY rank 1 skips a layer in the first micro-batch too."""
    specs.PLAIN = (MarkedColumn, MarkedRow)
    if os.environ["STRAY"] == os.environ["RANK"]:
        rows = ((False, True, False, False), ALL)
        SkipMask.running_all_first = lambda mask, num_microbatches: SkipMask(mask.stage, mask.step, rows)  # type: ignore[method-assign]
    with process_group(60.0):
        written = config(Path(os.environ["FOLDER"]), "delayed", data_parallel_size=2)
        print("runs", first_steps(written, 2)[0].layer_runs)


def test_two_ranks_agree_on_the_order(folder: Path) -> None:
    # One sample in three is text only, so that the ranks' first micro-batches differ in what the tower sees.
    outputs = run_ranks(two_ranks_start, 2, 120, STRAY="none", FOLDER=folder)
    assert all("runs (2, 1, 1, 2)" in output for output in outputs)


def test_another_order_on_one_rank_ends_both(folder: Path) -> None:
    with pytest.raises(RanksFailed) as failed:
        run_ranks(two_ranks_start, 2, 120, STRAY="1", FOLDER=folder)
    assert all("ScaleOrderError: precision.fp8=delayed: ranks that share layers" in out for out in failed.value.outputs)
