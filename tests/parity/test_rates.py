"""Learning rates step by step are those of transformers' schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_wsd_schedule,
)

from megatron_sts.config.resolve import resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.config.step_counts import num_decay_steps
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.model.init import build_model
from megatron_sts.train.stage import Stage, build_stage
from tests.train import stagehand

LR, NUM_STEPS = 1e-3, 20
RTOL = 1e-12
"""Double precision: a few roundings of 1e-16 each, and 1 + cos near 0 at the end of a cosine."""


def build(num_steps: int = NUM_STEPS, **optimizer: Any) -> Stage:
    written = stagehand.config()
    written["stages"] = [written["stages"][1] | {"steps": num_steps, "optimizer": {"lr": LR, **optimizer}}]
    resolved, gate = resolve(RunConfig.model_validate(written)), SkipGate()
    return build_stage(resolved, resolved.stages[0], groups.place(), build_model(resolved, gate), gate)


def rates(stage: Stage) -> dict[float, list[float]]:
    """What Adam takes in each step, by the largest rate of its groups."""
    found: dict[float, list[float]] = {}
    for _ in range(stage.spec.num_steps):
        for largest, rate in {(group["max_lr"], group["lr"]) for group in stage.optimizer.optimizer.param_groups}:
            found.setdefault(largest, []).append(rate)
        assert stage.optimizer.lr == found[LR][-1]
        stage.optimizer.scheduler.step(increment=1)
    stage.close()
    return found


def expected(schedule: Any, **numbers: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = schedule(optimizer, **numbers)
    found = []
    for _ in range(NUM_STEPS):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("optimizer", "schedule", "numbers"),
    [
        ({"warmup_steps": 5}, get_cosine_schedule_with_warmup, {"num_training_steps": NUM_STEPS}),
        ({"warmup_steps": 5, "schedule": "linear"}, get_linear_schedule_with_warmup, {"num_training_steps": NUM_STEPS}),
        ({"warmup_steps": 5, "schedule": "constant"}, get_constant_schedule_with_warmup, {}),
        (
            {"warmup_steps": 5, "schedule": "wsd", "decay_fraction": 0.3},
            get_wsd_schedule,
            {"num_decay_steps": 6, "num_training_steps": NUM_STEPS, "decay_type": "linear"},
        ),
        (
            {"schedule": "wsd", "decay_fraction": 0.29, "min_lr": 1e-4},
            get_wsd_schedule,
            {"num_decay_steps": 6, "num_training_steps": NUM_STEPS, "decay_type": "linear", "min_lr_ratio": 0.1},
        ),
    ],
    ids=["cosine", "linear", "constant", "wsd", "wsd to min_lr"],
)
def test_as_transformers(one_rank: None, optimizer: dict[str, Any], schedule: Any, numbers: dict[str, Any]) -> None:
    warmup = {"num_warmup_steps": optimizer.get("warmup_steps", 0)}
    reference = expected(schedule, **warmup, **numbers)
    parts = {"projector": {"lr": LR / 4}}
    found = rates(build(**optimizer, parts=parts))
    assert found == {
        LR: pytest.approx(reference, rel=RTOL),
        LR / 4: pytest.approx([rate / 4 for rate in reference], rel=RTOL),
    }


def test_a_stage_that_grows_falls_at_its_new_end(one_rank: None) -> None:
    wsd = {"schedule": "wsd", "decay_fraction": 0.5}
    short, grown, whole = build(10, **wsd), build(**wsd), rates(build(**wsd))[LR]
    short.optimizer.scheduler.step(increment=8)
    planned = short.optimizer.lr
    assert planned == pytest.approx(LR * 2 / 5)
    assert grown.optimizer.load_schedule(short.optimizer.scheduler.state_dict()) == planned
    short.close()
    rest = []
    for _ in range(8, NUM_STEPS):
        rest.append(grown.optimizer.lr)
        grown.optimizer.scheduler.step(increment=1)
    grown.close()
    assert rest == whole[8:] and rest[2] > rest[3]


@pytest.mark.parametrize(("fraction", "count"), [(0.001, 1), (0.29, 3), (0.25, 3), (0.35, 4), (1.0, 10)])
def test_halves_of_a_step_are_rounded_up(fraction: float, count: int) -> None:
    [stage, _] = RunConfig.model_validate(stagehand.config()).stages
    optimizer = stage.optimizer.model_copy(update={"schedule": "wsd", "decay_fraction": fraction})
    assert num_decay_steps(stage.model_copy(update={"optimizer": optimizer}), 10) == count
