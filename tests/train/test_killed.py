"""A run that is killed again and again, also within saves, ends as if nobody had disturbed it: bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from megatron_sts.config.run_folder import position, whole_checkpoints
from tests.train import stagehand
from tests.train.stagehand import act, config, digests, events, pieces, scene, steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SEED, NUM_STEPS = 17, 12
"""``tools/kill_drill.py`` kills as often as it is told to, at moments of the clock; these are the same every time."""


@pytest.fixture(scope="module", params=[False, True], ids=["synchronous", "asynchronous"])
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """The folder of a whole run and a killed one, and the step of the checkpoint that each kill left."""
    numbers, folder = random.Random(SEED), tmp_path_factory.mktemp("killed")
    written = config(parallel={"timeout_s": 100, **stagehand.LAYOUTS["DP=2"]})
    written["stages"] = [{**written["stages"][1], "steps": NUM_STEPS}]
    written["checkpoint"] = {"interval_steps": 1, "keep_last": 2, "asynchronous": request.param}
    killed, scenes = folder / "killed", [scene(folder / "whole", written)]
    kills: list[dict[str, Any]] = [
        {"kill_in_save": [3, numbers.uniform(0, 1)]},
        {"kill": [0, numbers.randrange(4, 6)]},
        {"kill_in_save": [2, numbers.uniform(0, 1)]},
        {"kill_in_save": [2, numbers.uniform(0.99, 1)]},  # within what the first rank writes last
    ]
    found = []
    for kill in kills:
        act(2, *scenes, scene(killed, written, **kill), killed=True)
        scenes = []
        found.append(position(whole_checkpoints(killed / "checkpoints")[-1])[1])
    assert act(2, scene(killed, written)) == [[0], [0]]
    return folder, found


def test_it_is_the_same(played: tuple[Path, list[int]]) -> None:
    whole, killed = (played[0] / name for name in ("whole", "killed"))
    assert steps(killed) == steps(whole) and len(steps(killed)) == NUM_STEPS
    for rank in range(2):
        assert digests(killed, rank)["finetune", NUM_STEPS] == digests(whole, rank)["finetune", NUM_STEPS]
    last = f"0-finetune-{NUM_STEPS:07d}"
    assert pieces(killed / "checkpoints" / last) == pieces(whole / "checkpoints" / last)


def test_each_start_went_on_from_a_checkpoint(played: tuple[Path, list[int]]) -> None:
    folder, left = played
    assert [event["step"] for event in events(folder / "killed", "resume")] == left
    assert len(left) == 4 and left[0] >= 1 and left == sorted(left) and left[-1] < NUM_STEPS


def test_nothing_is_left_of_saves_that_were_cut_off(played: tuple[Path, list[int]]) -> None:
    names = sorted(path.name for path in (played[0] / "killed" / "checkpoints").iterdir())
    assert names == [f"0-finetune-{step:07d}" for step in (NUM_STEPS - 1, NUM_STEPS)]
