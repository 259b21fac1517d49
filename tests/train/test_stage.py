"""What a stage leaves behind: nothing, or the next stage's memory would hold its gradient buffers too."""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path

import pytest

from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.stage import build_stage
from megatron_sts.train.step import train_step
from tests.dist.ladder import Written, resolved_run, write_inputs, written_run
from tests.dist.launch import run_ranks

SETTINGS: dict[str, Written] = {
    "plain": {},
    "overlapped distributed optimizer": {
        "use_distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True,
    },
}  # fmt: skip


def train_and_leave() -> None:
    """On each rank: trains a step in each setting; the wrappers must be gone when the stage is."""
    folder = Path(os.environ["FOLDER"])
    with process_group(60.0):
        for name, parallel in SETTINGS.items():
            resolved = resolved_run(written_run(folder, data_parallel_size=2, **parallel), 2)
            place, gate = groups.initialize(resolved.config.parallel, seed=1), SkipGate()
            stage = build_stage(resolved, resolved.stages[0], place, build_model(resolved, gate), gate)
            train_step(stage, 0)
            stage.optimizer.close()
            left = [weakref.ref(stage.chunks[0]), weakref.ref(stage.optimizer.optimizer)]
            del stage
            gc.collect()
            assert [ref() is None for ref in left] == [True, True], name
            groups.destroy()


@pytest.mark.timeout(120)
def test_a_stage_that_has_ended_is_freed(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    run_ranks(train_and_leave, 2, 100, FOLDER=tmp_path)
