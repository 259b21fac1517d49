"""A rank that would run other micro-batches than the step has is named, before others wait for it, or soon after."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sts.config.resolve import ResolvedStage, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.data.batch import Batch
from megatron_sts.train.agreement import DisagreementError, check_shapes
from tests.train import stagehand
from tests.train.stagehand import act_out, scene, told

TIMEOUT_S = 5.0
"""Three micro-batches on one pipeline rank and four on the other are noticed by a wait."""


def written(**parallel: Any) -> dict[str, Any]:
    return stagehand.config(parallel={"timeout_s": 60, **parallel})


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_rank_that_differs_is_named(tmp_path: Path) -> None:
    pipeline = {"pipeline_model_parallel_size": 2}
    outputs = act_out(
        2,
        scene(tmp_path / "copies", written(data_parallel_size=2), fewer=[0, 2], fails_together=True),
        # With a tower that all ranks share, the first rank waits for the other's features, and its launcher ends it.
        scene(tmp_path / "shapes", written(**pipeline, vision="first"), shapes=[0, 2], fails_together=True),
        scene(tmp_path / "fewer", written(**pipeline, timeout_s=TIMEOUT_S), fewer=[0, 1]),
    )
    scenes = stagehand.outcomes(outputs)
    assert [[each["status"] for each in rank] for rank in scenes] == [[1, 1, 1]] * 2
    host = os.uname().nodename
    # Without the sum copies would go on with gradients of other samples than the loss says.
    assert told(outputs, "of 2 micro-batches").startswith(
        f"stage alignment, step 2: rank 1 ({host}) ran 1 of 2 micro-batches; nothing was updated; "
    )
    assert told(outputs, "tokens here").startswith(
        "stage alignment, step 2: micro-batch 0 has 2 x 64 tokens here, not 2 x 72; "
    )
    (line,) = [line for output in outputs for line in output.splitlines() if "of the same model copy" in line]
    assert line.startswith(f"megatron-sts: error: rank 1 ({host}, pid ")
    assert " has 3 micro-batches of 2 x 72 tokens, but rank 0 (" in line
    assert (
        " 4 micro-batches of 2 x 72 tokens in stage alignment, step 1, of the same model copy (RuntimeError: " in line
    )
    assert all(rank[2]["seconds"] < TIMEOUT_S + 10 + 10 for rank in scenes)  # and a start on a busy machine


def stage(packing: str) -> ResolvedStage:
    config = stagehand.config()
    config["stages"] = [config["stages"][1]]
    config["stages"][0]["batch"] |= {"packing": packing}
    return resolve(RunConfig.model_validate(config), world_size=1).stages[0]


def batch(num_rows: int, num_tokens: int) -> Batch:
    found = object.__new__(Batch)
    object.__setattr__(found, "tokens", torch.zeros(num_rows, num_tokens, dtype=torch.int64))
    return found


def test_shapes_of_a_step() -> None:
    padded, longest = stage("pad"), stage("none")
    check_shapes(padded, 0, [batch(2, 104)] * 4)
    check_shapes(longest, 0, [batch(2, 96)] * 4)
    with pytest.raises(
        DisagreementError, match=r"^stage finetune, step 3: 3 micro-batches here, not 4; nothing was updated"
    ):
        check_shapes(padded, 3, [batch(2, 104)] * 3)
    for spec, odd, said in (
        (padded, batch(2, 96), "2 x 96 tokens here, not 2 x 104"),
        (padded, batch(1, 104), "1 x 104 tokens here, not 2 x 104"),
        (longest, batch(2, 112), "2 x 112 tokens here, not 2 x 104"),
    ):
        with pytest.raises(DisagreementError, match=rf"^stage finetune, step 3: micro-batch 2 has {said}"):
            check_shapes(spec, 3, [batch(2, 104), batch(2, 104), odd, batch(2, 104)])
