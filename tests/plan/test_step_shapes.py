"""What steps run under their masks, and that their mean costs what they cost in the mean."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from megatron_sts.config.resolve import Resolved
from megatron_sts.cost.communication import communication
from megatron_sts.lds.effective import executed_fraction
from megatron_sts.lds.placement import placement
from megatron_sts.plan.step_shapes import mean_steps, step_shape
from tests.dry.configs import run_of

PIPELINED = {
    "pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2,
    "data_parallel_size": 2, "use_distributed_optimizer": True,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "dense": {},
    "independent layers": {"lds": {}},
    "other layers in each micro-batch": {"lds": {"granularity": "microbatch"}},
    "rounds": {"lds": {"sampler": "rounds"}},
    "zero gradients": {"lds": {"skipped_update": "zero_grad"}},
    "VTC falls": {"vtc": {"keep_ratio": 1.0, "schedule": "linear", "final_keep_ratio": 0.25, "full_every": 5}},
}
ROUNDING = 1e-9


def bytes_of(resolved: Resolved, steps: list[tuple[float, Any]]) -> list[dict[tuple[str, str, str], float]]:
    """By group, kind and purpose, on each pipeline rank."""
    stage = resolved.stages[0]
    found: list[dict[tuple[str, str, str], float]] = [defaultdict(float) for _ in range(2)]
    for share, step in steps:
        for rank, lines in enumerate(communication(resolved, stage, step, "engine")):
            for line in lines:
                found[rank][line.group, line.kind, line.what] += share * line.num_bytes
    return found


@pytest.mark.parametrize("name", CASES)
def test_the_mean_step_exchanges_what_steps_do_in_the_mean(name: str) -> None:
    resolved = run_of(parallel=PIPELINED, steps=40, **CASES[name])
    stage = resolved.stages[0]
    each = [(1 / 40, step_shape(resolved, stage, step)) for step in range(40)]
    mean = mean_steps(resolved, stage)
    assert sum(share for share, _ in mean) == pytest.approx(1)
    for found, expected in zip(bytes_of(resolved, mean), bytes_of(resolved, each), strict=True):
        assert found == pytest.approx(expected, rel=ROUNDING)


def test_a_step_runs_what_its_mask_leaves() -> None:
    lds = {"sampler": "fixed", "fixed_layers": [0, 1]}
    resolved = run_of(parallel=PIPELINED, lds=lds)
    step = step_shape(resolved, resolved.stages[0], 3)
    assert step.layer_runs == (0, 0, 2, 2) and step.layer_active == (0, 0, 1, 1)
    assert step.num_units == 1  # the first round joins the second: embedding and tower run in any case


def test_the_mean_runs_what_the_schedule_promises() -> None:
    """Binomial noise of 256 masks: three standard deviations of sqrt(p (1 - p) / 256) are at most 0.094."""
    resolved = run_of(parallel=PIPELINED, steps=5000, lds={})
    stage = resolved.stages[0]
    [(_, step)] = mean_steps(resolved, stage)
    assert stage.config.lds is not None
    promised = executed_fraction(stage.config.lds, stage.num_steps, placement(resolved, stage))
    assert [runs / stage.num_microbatches for runs in step.layer_runs] == pytest.approx(promised, abs=0.094)
