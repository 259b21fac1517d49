"""A run that grows beyond the steps it began with, and one that begins with another's weights, on two ranks in other layouts."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sts.config.resolve import resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.mcore.checkpoint import load_model
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from tests.dist.ladder import gather_weights
from tests.dist.launch import run_ranks
from tests.train import driver
from tests.train.stagehand import TIMEOUT_S, config, events, outcomes, scene, steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
PP2: dict[str, Any] = {"timeout_s": 100, "pipeline_model_parallel_size": 2}
TP2: dict[str, Any] = {"timeout_s": 100, "tensor_model_parallel_size": 2}
PARTS = ("vision", "projector", "language")


def finetuned(num_steps: int, num_alignment_steps: int = 1) -> dict[str, Any]:
    """Schedules that depend on the stage's length: learning rate, LDS and VTC."""
    first, second = config()["stages"]
    vtc = {"keep_ratio": 1.0, "schedule": "linear", "final_keep_ratio": 0.25}
    stages = [first | {"steps": num_alignment_steps}, second | {"steps": num_steps, "vtc": vtc}]
    return config(parallel=PP2, stages=stages)


def begun_with(source: Path) -> dict[str, Any]:
    """In another layout than the source."""
    written = config(parallel=TP2)
    for part in PARTS:
        written["model"].setdefault(part, {})["init"] = str(source)
    return written


def play_and_compare() -> None:
    """What the ranks run: the scenes, then the weights that a run begins with beside what megatron-core itself loads."""
    driver.play()
    source = Path(os.environ["SOURCE"])
    with process_group(100.0):
        resolved = resolve(RunConfig.model_validate(begun_with(source.parent / "alignment")), world_size=2)
        groups.initialize(resolved.config.parallel, seed=7)
        found = gather_weights(build_model(resolved, SkipGate()))
        plain = build_model(resolved, SkipGate(), load_init=False)
        random = gather_weights(plain)
        load_model(source / "state", plain)
        expected = gather_weights(plain)
        groups.destroy()
    assert found.keys() == expected.keys()
    same = [name for name in found if torch.equal(found[name], expected[name])]
    drawn = [name for name in found if torch.equal(found[name], random[name]) and found[name].std() > 0]
    print("WEIGHTS", json.dumps({"all": len(found), "same": len(same), "drawn": drawn}))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("other_run")
    written = begun_with(folder / "grown" / "checkpoints" / "finetune")
    scenes = [
        scene(folder / "whole", finetuned(6)),
        scene(folder / "grown", finetuned(4)),
        scene(folder / "grown", finetuned(6)),
        scene(folder / "second", written | {"stages": [written["stages"][0] | {"steps": 1}]}),
    ]
    source = folder / "grown" / "checkpoints" / "0-alignment-0000001"
    return folder, run_ranks(play_and_compare, 2, TIMEOUT_S, SCENES=json.dumps(scenes), SOURCE=source)


def test_a_grown_stage_follows_the_schedules_of_its_length(played: tuple[Path, list[str]]) -> None:
    folder, outputs = played
    assert [outcome["status"] for rank in outcomes(outputs) for outcome in rank] == [0] * 8
    whole, grown = steps(folder / "whole"), steps(folder / "grown")
    assert len(grown) == len(whole) == 7
    planned = ("lr", "skip_digest", "visual_tokens_out", "tokens", "samples")
    for step in (4, 5):
        for name in planned:
            assert grown["finetune", step][name] == whole["finetune", step][name], name
        assert grown["finetune", step]["updated"]
    # Up to there it was the shorter run: its learning rate had come to its end.
    assert grown["finetune", 3]["lr"] < whole["finetune", 3]["lr"]
    (event,) = events(folder / "grown", "extend")
    assert (event["stage"], event["num_steps_before"], event["num_steps"]) == ("finetune", 4, 6)
    assert event["lr"] == grown["finetune", 4]["lr"] > event["lr_before"] == 0
    assert "stage finetune now has 6 steps instead of 4" in outputs[0]


def test_another_layout_begins_with_the_very_weights(played: tuple[Path, list[str]]) -> None:
    for output in played[1]:
        (line,) = [line for line in output.splitlines() if line.startswith("WEIGHTS ")]
        found = json.loads(line.removeprefix("WEIGHTS "))
        assert found["all"] == found["same"] > 30 and found["drawn"] == []


def test_a_run_begins_with_another_runs_weights(played: tuple[Path, list[str]]) -> None:
    folder, _ = played
    # Alignment after the source's own alignment and fine-tuning: better than where that began.
    second, source = steps(folder / "second"), steps(folder / "grown")
    assert second["alignment", 0]["loss"] < source["alignment", 0]["loss"]
    assert second["alignment", 0]["lr"] == source["alignment", 0]["lr"]
