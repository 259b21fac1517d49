"""What follows from few micro-batches is what all of them do; remembered shapes are those that operations give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_sts.dry.account import Account
from megatron_sts.dry.run import rank_of_stage, run
from megatron_sts.dry.shapes import KnownShapes
from tests.dry.configs import run_of

PIPELINES: dict[str, dict[str, Any]] = {
    "one stage, shared pixels": {
        "parallel": {"tensor_model_parallel_size": 2},
        "batch": {"global_batch_size": 10},
    },
    "1F1B, everything overlapped": {
        "parallel": {
            "pipeline_model_parallel_size": 2,
            "data_parallel_size": 2,
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "overlap_param_gather": True,
        },
        "batch": {"global_batch_size": 36},
    },
    "interleaved, rounds skipped": {
        "parallel": {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": 2,
            "virtual_pipeline_model_parallel_size": 4,
        },
        "language": {"num_layers": 8},
        "batch": {"global_batch_size": 20},
        "lds": {"sampler": "fixed", "fixed_layers": [2, 3]},
    },
}


PEAK_RTOL = 2e-3
"""Micro-batches' token ids and reports, which come and go or are kept; at these tiny sizes they show."""


def counted(account: Account, peak_bytes: int | None = None) -> Account:
    """Without what tells how it was counted; with another peak."""
    memory = account.memory if peak_bytes is None else replace(account.memory, peak_bytes=peak_bytes)
    return replace(account, seconds=0.0, num_executed=0, memory=memory)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("is_last", [False, True], ids=["first stage", "last stage"])
def test_the_rest_does_what_the_first_micro_batches_do(name: str, is_last: bool) -> None:
    resolved = run_of(**PIPELINES[name])
    pp = resolved.config.parallel.pipeline_model_parallel_size
    if is_last and pp == 1:
        pytest.skip("there is one stage only")
    rank = rank_of_stage(resolved, pp - 1 if is_last else 0)
    few, whole = run(resolved, rank), run(resolved, rank, run_all=True)
    assert few.num_executed == 4 * pp < whole.num_executed == resolved.stages[0].num_microbatches
    assert few.memory.peak_bytes == pytest.approx(whole.memory.peak_bytes, rel=PEAK_RTOL)
    assert counted(few, peak_bytes=0) == counted(whole, peak_bytes=0)


def test_masks_of_micro_batches_are_all_run() -> None:
    lds = {"alpha": 0.5, "granularity": "microbatch"}
    account = run(run_of(lds=lds), step=0)
    assert account.num_executed == account.num_microbatches == 4
    assert len(set(account.layer_runs.values())) > 1


def test_remembered_shapes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = run_of(parallel={"recompute": "selective"}, freeze=[], vtc={"sampler": "anchored"})
    remembered = run(resolved)
    monkeypatch.setattr(KnownShapes, "run", lambda _self, func, args, kwargs: func(*args, **kwargs))
    assert counted(run(resolved)) == counted(remembered)
