"""A leap of the loss: back to the newest checkpoint, and on without the samples that led there, whatever dies on the way."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.resolve import resolve
from megatron_sts.config.saving import GuardConfig
from megatron_sts.config.schema import RunConfig
from megatron_sts.train.resume import Progress
from megatron_sts.train.spikes import SpikeError, usual_loss, way_back
from tests.train import stagehand
from tests.train.stagehand import LAYOUTS, act, digests, events, lines, scene, steps

NUM_STEPS, LEAP_AT, BACK_TO = 10, 7, 6
GUARD = {"spike_factor": 5.0, "spike_window_steps": 3}


def sizes_of(line: dict[str, Any]) -> tuple[int, int]:
    """What a step's samples are known by."""
    return line["tokens"], line["loss_tokens"]


def written(num_steps: int = NUM_STEPS) -> dict[str, Any]:
    stage = stagehand.config()["stages"][1] | {"steps": num_steps}
    return stagehand.config(
        stages=[stage], parallel=LAYOUTS["DP=2"], checkpoint={"interval_steps": 3, "keep_last": 9}, guard=GUARD
    )


@pytest.mark.timeout(600)
def test_samples_that_make_the_loss_leap_are_left_out(tmp_path: Path) -> None:
    plain, back, dying = (tmp_path / name for name in ("plain", "back", "dying"))
    config = written()
    leap = {"leap": [0, LEAP_AT]}
    act(2, scene(plain, written(NUM_STEPS + 2)), scene(back, config, **leap))
    # Dies once it has gone back and on, before it saves again: the next start meets the same leap.
    act(2, scene(dying, config, **leap, kill=[0, LEAP_AT + 1]), killed=True)
    act(2, scene(dying, config, **leap))
    assert len(events(dying, "spike")) == 2

    assert not events(plain, "spike")
    (event,) = events(back, "spike")
    place = {"stage": "finetune", "step": LEAP_AT, "to_step": BACK_TO, "skipped_steps": LEAP_AT + 1 - BACK_TO}
    assert place.items() <= event.items() and event["loss"] > 5 * event["usual_loss"]
    trained = [line["step"] for line in lines(back) if "event" not in line]
    assert trained == [*range(LEAP_AT + 1), *range(BACK_TO, NUM_STEPS)]

    # Step n has the samples of step n + 2 from then on; up to there nothing differs.
    before, after = steps(plain), steps(back)
    num_skipped = LEAP_AT + 1 - BACK_TO
    sizes = [sizes_of(before["finetune", step]) for step in range(NUM_STEPS + 2)]
    tails = [sizes[BACK_TO + number :][: NUM_STEPS - BACK_TO] for number in range(3)]
    assert tails[num_skipped] not in tails[:num_skipped]  # they tell steps apart
    expected = sizes[:BACK_TO] + tails[num_skipped]
    assert [sizes_of(after["finetune", step]) for step in range(NUM_STEPS)] == expected
    progress = json.loads((back / "checkpoints" / f"0-finetune-{NUM_STEPS:07d}" / "progress.json").read_text())
    assert (progress["num_rollbacks"], progress["num_left_out"]) == (1, num_skipped)

    assert steps(dying) == after
    for rank in range(2):
        assert digests(dying, rank) == digests(back, rank)


@pytest.mark.timeout(600)
def test_a_leap_soon_after_a_way_back_goes_back_further(tmp_path: Path) -> None:
    """Also if the run dies then, and meets both leaps again."""
    further, dying = tmp_path / "further", tmp_path / "dying"
    leap = {"leap": [0, LEAP_AT, 0, LEAP_AT]}  # the second one by other samples
    act(2, scene(further, written(), **leap), scene(dying, written(), **leap, kill_again=[0, BACK_TO - 1]), killed=True)
    act(2, scene(dying, written(), **leap))

    newest, before = (f"0-finetune-{step:07d}" for step in (BACK_TO, BACK_TO - 3))
    back, again = [newest, before], [before, newest, before]
    assert [event["to_step"] for event in events(further, "spike")] == [BACK_TO, BACK_TO - 3]
    (aside,) = events(further, "set_aside")
    assert (aside["checkpoint"], aside["to"]) == (newest, f"suspect-{newest}")
    trained = [line["step"] for line in lines(further) if "event" not in line]
    assert trained == [*range(LEAP_AT + 1), *range(BACK_TO, LEAP_AT + 1), *range(BACK_TO - 3, NUM_STEPS)]
    progress = json.loads((further / "checkpoints" / f"0-finetune-{NUM_STEPS:07d}" / "progress.json").read_text())
    num_seen = LEAP_AT + 1 + (LEAP_AT + 1 - BACK_TO)
    assert (progress["num_rollbacks"], progress["num_left_out"]) == (2, num_seen - (BACK_TO - 3))

    assert [event["to_step"] for event in events(dying, "spike")] == [BACK_TO, BACK_TO - 3] * 2
    assert [event["checkpoint"] for event in events(dying, "resume")] == back + again
    assert steps(dying) == steps(further)
    for rank in range(2):
        assert digests(dying, rank) == digests(further, rank)


@pytest.mark.timeout(600)
def test_a_stop_in_the_step_that_leaps_saves_nothing(tmp_path: Path) -> None:
    back, stopped = tmp_path / "back", tmp_path / "stopped"
    leap = {"leap": [0, LEAP_AT]}
    stop = scene(stopped, written(), **leap, stop=[0, LEAP_AT])
    assert act(2, scene(back, written(), **leap), stop, scene(stopped, written(), **leap)) == [[0, 0, 0]] * 2
    (event,) = events(stopped, "stop")
    assert (event["step"], event["is_saved"]) == (LEAP_AT + 1, False)
    assert next(event["checkpoint"] for event in events(stopped, "resume")) == f"0-finetune-{BACK_TO:07d}"
    assert len(events(stopped, "spike")) == 2 and steps(stopped) == steps(back)
    for rank in range(2):
        assert digests(stopped, rank) == digests(back, rank)


def test_what_a_leap_is() -> None:
    guard = GuardConfig(spike_factor=2.0, spike_window_steps=3)
    assert usual_loss(guard, Progress(recent_losses=[1.0, 2.0, 9.0])) is None  # too few
    assert usual_loss(guard, Progress(recent_losses=[1.0, 3.0, 2.0, 4.0])) is None
    assert usual_loss(guard, Progress(recent_losses=[1.0, 9.0, 2.0, 4.1])) == 2.0
    assert usual_loss(guard, Progress(recent_losses=[0.0, 0.0, 0.0, 1e-6])) is None  # learnt by heart
    assert usual_loss(GuardConfig(), Progress()) is None


def test_ways_back_are_counted(tmp_path: Path) -> None:
    resolved = resolve(RunConfig.model_validate(written()), world_size=2)
    stage: Any = SimpleNamespace(resolved=resolved, spec=resolved.stages[0])
    told: list[Any] = []
    log: Any = SimpleNamespace(event=lambda *_, **details: told.append(details), warn=lambda _: None)
    leapt = Progress(step=8, recent_losses=[1.0, 1.0, 1.0, 9.0], num_rollbacks=2, num_left_out=3)

    def checkpoints(newest: Progress) -> Any:
        return SimpleNamespace(settle=lambda: None, find=lambda: newest, has_before=lambda _: False)

    # The checkpoint may be from before the ways back that came before.
    back = way_back(stage, checkpoints(Progress(step=6, num_samples=48, num_rollbacks=1)), leapt, log)
    assert back == Progress(step=6, num_samples=48, num_rollbacks=3, num_left_out=5)
    assert way_back(stage, checkpoints(Progress()), leapt, log) is None and told[-1]["to_step"] is None
    spent = Progress(step=8, recent_losses=leapt.recent_losses, num_rollbacks=3)
    with pytest.raises(
        SpikeError, match=r"^stage finetune, step 7: loss 9 is 9 times the median 1 .* after 3 ways back"
    ):
        way_back(stage, checkpoints(Progress(step=6)), spent, log)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"checkpoint": {}}, "so there is none to go back to"),
        ({"checkpoint": {"interval_steps": 4}}, r"checkpoint\.interval_steps=4 saves nothing within a stage \(the longest has 4"),
        ({"stages": [stagehand.config()["stages"][1] | {"batch": stagehand.config()["stages"][1]["batch"] | {"packing": "pack"}}]},
         "stages.finetune.batch.packing=pack reads on from where it was"),
    ],
)  # fmt: skip
def test_where_no_way_back_is(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^guard\.spike_factor=5\.0: .*{reason}"):
        resolve(RunConfig.model_validate(stagehand.config(guard=GUARD, **changes)), world_size=1)


@pytest.mark.parametrize(
    ("guard", "reason"),
    [
        ({**GUARD, "spike_window_steps": 4}, r"spike_window_steps=4: .* no stage has more than 4 steps; use at most 3"),
        ({"spike_window_steps": 3}, r"spike_window_steps=3: guard\.spike_factor=null looks for no leaps"),
        ({"max_rollbacks": 1}, r"max_rollbacks=1: guard\.spike_factor=null looks for no leaps"),
    ],
)
def test_options_that_could_never_act(guard: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^guard\.{reason}"):
        resolve(RunConfig.model_validate(stagehand.config(guard=guard)), world_size=1)
