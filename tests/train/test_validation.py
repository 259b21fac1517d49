"""Validation leaves training as it is, comes again as it was after a kill, gives way to a stop, and keeps the best checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sts.config.run_folder import checkpoint_of
from megatron_sts.report.run import read_run
from tests.train import stagehand
from tests.train.stagehand import act, act_out, config, digests, events, outcomes, scene, steps
from tests.train.test_damaged import flip

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_SAMPLES = 11
"""Two rounds of eight, the last one not full."""
VALIDATED_AT = [("alignment", 3), ("alignment", 4), ("finetune", 3), ("finetune", 4)]


def validated(written: dict[str, Any], **settings: Any) -> dict[str, Any]:
    settings = {"interval_steps": 3, "num_samples": NUM_SAMPLES, **settings}
    return {**written, "stages": [{**stage, "validation": settings} for stage in written["stages"]]}


def losses(run: Path) -> dict[tuple[str, int], tuple[Any, ...]]:
    """What the last validation of each step found."""
    counted = ("loss", "loss_tokens", "samples", "samples_skipped")
    found = [(name, line) for name, lines in read_run(run).validations.items() for line in lines]
    return {(name, line["step"]): tuple(line[key] for key in counted) for name, line in found}


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run without validation, with it, and with it but killed before it is saved; one in which a stop comes meanwhile."""
    folder = tmp_path_factory.mktemp("validated")
    written = config(parallel={"timeout_s": 100, **stagehand.LAYOUTS["DP=2"]})
    with_it = validated(written)
    killed = scene(folder / "killed", with_it, kill=[0, 3])
    act(2, scene(folder / "plain", written), scene(folder / "validated", with_it), killed, killed=True)
    boards = {**with_it, "logging": {"tensorboard": True}}
    stopped = scene(folder / "stopped", boards, stop_in_validation=3)
    outputs = act_out(2, scene(folder / "killed", with_it), stopped, scene(folder / "stopped", boards))
    assert [[outcome["status"] for outcome in rank] for rank in outcomes(outputs)] == [[0, 0, 0]] * 2
    return folder, outputs


def test_training_is_the_same_to_the_last_bit(played: tuple[Path, list[str]]) -> None:
    folder, _ = played
    plain = steps(folder / "plain")
    for name in ("validated", "killed", "stopped"):
        assert steps(folder / name) == plain and len(plain) == 8
        for rank in range(2):
            assert digests(folder / name, rank).items() >= digests(folder / "plain", rank).items()


def test_the_same_samples_each_time_and_after_a_kill(played: tuple[Path, list[str]]) -> None:
    folder, outputs = played
    found = losses(folder / "validated")
    assert list(found) == VALIDATED_AT and not events(folder / "plain", "validation")
    for stage in ("alignment", "finetune"):
        [counts] = {each[1:] for (name, _), each in found.items() if name == stage}
        assert counts[1:] == (NUM_SAMPLES, 0)
    assert len({loss for loss, *_ in found.values()}) == len(VALIDATED_AT)
    assert losses(folder / "killed") == found
    told = [line for line in outputs[0].splitlines() if "validation loss" in line]
    loss = found["finetune", 4][0]
    assert told[-1].startswith(f"megatron-sts: stage finetune, 4 steps done: validation loss {loss:.4f} (11 samples, ")
    assert not [line for line in outputs[1].splitlines() if "validation loss" in line]


def test_a_stop_does_not_wait_for_a_validation(played: tuple[Path, list[str]]) -> None:
    folder, _ = played
    (event,) = events(folder / "stopped", "stop")
    assert (event["stage"], event["step"], event["is_saved"]) == ("alignment", 3, True)
    assert losses(folder / "stopped") == {
        place: found for place, found in losses(folder / "validated").items() if place != ("alignment", 3)
    }
    progress = json.loads((folder / "stopped" / "checkpoints" / "0-alignment-0000003" / "progress.json").read_text())
    assert progress["validation_loss"] is None


def test_tensorboard_has_it_where_its_weights_came_from(played: tuple[Path, list[str]]) -> None:
    """At the step whose training loss has the same weights."""
    folder, _ = played
    board = EventAccumulator(str(folder / "stopped" / "tensorboard")).Reload()
    found = losses(folder / "validated")
    shown = [(entry.step, entry.value) for entry in board.Scalars("finetune/validation_loss")]
    assert shown == [(step, pytest.approx(found["finetune", step][0])) for step in (3, 4)]


def names(run: Path) -> set[str]:
    return {path.name for path in (run / "checkpoints").iterdir()}


def test_the_best_checkpoints_stay(tmp_path: Path) -> None:
    """Of six checkpoints the newest and the two with the lowest losses, of which one is found damaged by a later start."""
    whole, damaged = tmp_path / "whole", tmp_path / "damaged"
    written = validated(config(checkpoint={"interval_steps": 1, "keep_last": 1, "keep_best": 2}), interval_steps=1)
    written["stages"] = [{**written["stages"][1], "steps": 6}]
    found = [3.0, 1.0, None, 2.0, 5.0, 1.5]
    stopped = scene(damaged, written, validations=found, stop=[0, 4])
    assert act(1, scene(whole, written, validations=found), stopped) == [[0, 0]]
    assert names(whole) == {"0-finetune-0000002", "0-finetune-0000006"}
    assert [event["loss"] for event in events(whole, "validation")] == found
    best = whole / "checkpoints" / "finetune" / "best"
    assert checkpoint_of(best).name == "0-finetune-0000002"

    left = {"0-finetune-0000002", "0-finetune-0000004", "0-finetune-0000005"}
    assert names(damaged) == left
    flip(damaged / "checkpoints" / "0-finetune-0000002")
    assert act(1, scene(damaged, written, validations=found[5:])) == [[0]]
    (event,) = events(damaged, "set_aside")
    assert (event["checkpoint"], event["to"]) == ("0-finetune-0000002", "broken-0-finetune-0000002")
    assert [event["checkpoint"] for event in events(damaged, "resume")] == ["0-finetune-0000005"]
    assert names(damaged) == {"broken-0-finetune-0000002", "0-finetune-0000004", "0-finetune-0000006"}
    assert steps(damaged) == steps(whole)
