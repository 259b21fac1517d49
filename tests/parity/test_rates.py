"""Learning rates step by step are those of transformers' schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup, get_wsd_schedule

from megatron_sts.config.resolve import resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.model.init import build_model
from megatron_sts.train.stage import build_stage
from tests.train import stagehand

LR, NUM_STEPS = 1e-3, 20
RTOL = 1e-12
"""Double precision: a few roundings of 1e-16 each, and 1 + cos near 0 at the end of a cosine."""


def rates(**optimizer: Any) -> list[float]:
    """Of the steps of a stage."""
    written = stagehand.config()
    written["stages"] = [written["stages"][1] | {"steps": NUM_STEPS, "optimizer": {"lr": LR, **optimizer}}]
    resolved, gate = resolve(RunConfig.model_validate(written)), SkipGate()
    stage = build_stage(resolved, resolved.stages[0], groups.place(), build_model(resolved, gate), gate)
    found = []
    for _ in range(NUM_STEPS):
        found.append(stage.optimizer.lr)
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
    ids=["cosine", "constant", "wsd", "wsd to min_lr"],
)
def test_as_transformers(one_rank: None, optimizer: dict[str, Any], schedule: Any, numbers: dict[str, Any]) -> None:
    warmup = {"num_warmup_steps": optimizer.get("warmup_steps", 0)}
    assert rates(**optimizer) == pytest.approx(expected(schedule, **warmup, **numbers), rel=RTOL)
