"""Checkpoints that are written while training goes on hold what the model was, and fail, wait and go on as others do."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train import stagehand
from tests.train.stagehand import act, act_out, config, digests, events, lines, pieces, scene, steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NAMES = [f"0-finetune-{step:07d}" for step in (2, 4, 6)]


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Six steps on two ranks with the distributed optimizer: saved by the loop itself; beside it; with a disk that is full for
    the first save; and killed while the second save is under way, and gone on with one checkpoint that stays.
    """
    folder = tmp_path_factory.mktemp("asynchronous")
    written = config(parallel={"timeout_s": 100, **stagehand.LAYOUTS["DP=2"]})
    written["stages"] = [{**written["stages"][1], "steps": 6}]
    apart = {**written, "checkpoint": {**written["checkpoint"], "asynchronous": True}}
    outputs = act_out(
        2,
        scene(folder / "whole", written),
        scene(folder / "apart", apart, slow_disk=[0.3, 1, 2]),
        scene(folder / "full", apart, full_disk=[1, 1]),
        scene(folder / "killed", apart, kill=[0, 4], slow_disk=[100, 2]),
        killed=True,
    )
    assert len(list((folder / "killed" / "checkpoints").glob(".partial-*"))) == 1
    few = {**apart, "checkpoint": {**apart["checkpoint"], "keep_last": 1}}
    act(2, scene(folder / "killed", few, slow_removal=1.5))
    return folder, outputs


def test_checkpoints_hold_what_the_model_was(played: tuple[Path, list[str]]) -> None:
    folder = played[0]
    for name in NAMES:
        here, there = (pieces(folder / run / "checkpoints" / name) for run in ("whole", "apart"))
        assert here.keys() == there.keys()
        assert [key for key in here if here[key] != there[key]] == []
    assert here != pieces(folder / "whole" / "checkpoints" / NAMES[0])


@pytest.mark.parametrize("name", ["apart", "full", "killed"])
def test_the_run_is_the_same(played: tuple[Path, list[str]], name: str) -> None:
    folder = played[0]
    assert steps(folder / name) == steps(folder / "whole") and len(steps(folder / name)) == 6
    for rank in range(2):
        assert digests(folder / name, rank) == digests(folder / "whole", rank)


def test_training_goes_on_meanwhile(played: tuple[Path, list[str]]) -> None:
    """By the loop itself a checkpoint is there before the next step's line."""

    def is_before_next_step(run: str) -> bool:
        names = [line.get("checkpoint") or line.get("step") for line in lines(played[0] / run)]
        return names.index(NAMES[0]) < names.index(2)

    assert is_before_next_step("whole") and not is_before_next_step("apart")
    whole, apart = (
        [line["checkpoint_s"] for line in lines(played[0] / run) if "loss" in line] for run in ("whole", "apart")
    )
    assert [seconds > 0 for seconds in whole] == [False, False, True, False, True, False]
    (saved_s, *_) = (event["save_s"] for event in events(played[0] / "apart", "checkpoint"))
    assert apart[2] < 0.3 <= saved_s  # the disk was slow, and training did not wait for it
    assert [event["checkpoint"] for event in events(played[0] / "apart", "checkpoint")] == NAMES


def test_a_full_disk_is_told(played: tuple[Path, list[str]]) -> None:
    folder, outputs = played
    (event,) = events(folder / "full", "checkpoint_failed")
    assert (event["step"], event["cause"]) == (2, "rank 1: File too large")
    warning = f"warning: checkpoint {NAMES[0]} could not be written (rank 1: File too large); there is no earlier one; training"
    assert warning in outputs[0] and warning not in outputs[1]


def test_a_run_that_is_done_leaves_nothing_else(played: tuple[Path, list[str]]) -> None:
    run = played[0] / "killed"
    assert [event["checkpoint"] for event in events(run, "resume")] == NAMES[:1]
    assert [path.name for path in (run / "checkpoints").iterdir()] == NAMES[-1:]
