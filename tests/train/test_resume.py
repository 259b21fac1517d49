"""Whatever ends a run, starting it again gives what the uninterrupted run gives, bit for bit, in every layout."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.train import stagehand
from tests.train.stagehand import act, act_out, config, digests, events, lines, scene, steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass
class Played:
    """The runs of one layout, and what became of each."""

    folder: Path
    num_ranks: int
    written: dict[str, Any]
    statuses: list[list[int]]
    outputs: list[str]

    def __truediv__(self, name: str) -> Path:
        return self.folder / name


@pytest.fixture(scope="session", params=["PP=2", "DP=2"])
def played(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """One run in one piece; one killed in both stages and stopped once; and runs with mishaps of other kinds."""
    folder = tmp_path_factory.mktemp("played")
    layout = stagehand.LAYOUTS[request.param]
    written, num_ranks = config(parallel={"timeout_s": 100, **layout}), 2
    samples = stagehand.write_samples(tmp_path_factory.mktemp("samples"))
    lenient, strict = (stagehand.config_on(samples, f, parallel=written["parallel"]) for f in (0.9, 0.4))
    each = {**written, "checkpoint": {"interval_steps": 1, "keep_last": 99}}
    broken = folder / "broken"

    act(num_ranks, scene(folder / "whole", written), scene(broken, written, kill=[0, 3]), killed=True)
    (broken / "checkpoints" / ".partial-0-alignment-0000099" / "state").mkdir(parents=True)
    (broken / "checkpoints" / "0-alignment-0000004" / "state").mkdir(parents=True)  # where the run will save next
    act(num_ranks, scene(broken, written, stop=[1, 0]), scene(broken, written, kill=[1, 3]), killed=True)
    # A run that fails comes last: process groups cannot be taken down safely after an error, and need not be.
    first = act_out(
        num_ranks,
        scene(broken, written),
        scene(folder / "nan", each, nan=[1, 1], blank=[1, 2]),
        scene(folder / "bad", lenient),
        scene(folder / "crowded", written, full_disk=[1, 2]),
        scene(
            folder / "full",
            {**written, "checkpoint": {**written["checkpoint"], "max_failures": 2}},
            full_disk=[1, 2, 3],
        ),
    )
    diverging = scene(folder / "diverging", too_fast(written), fails_together=True)
    second = act_out(num_ranks, scene(folder / "full", written), diverging, scene(folder / "too bad", strict))
    outputs = [one + other for one, other in zip(first, second, strict=True)]
    statuses = [[outcome["status"] for outcome in rank] for rank in stagehand.outcomes(outputs)]
    return Played(folder, num_ranks, written, statuses, outputs)


def test_statuses(played: Played) -> None:
    assert played.statuses == [[0, 0, 0, 0, 1, 0, 1, 1]] * played.num_ranks, "\n".join(played.outputs)


def test_killed_and_stopped_run_is_the_whole_one(played: Played) -> None:
    broken = played / "broken"
    assert steps(broken) == steps(played / "whole") and len(steps(broken)) == 8
    for rank in range(played.num_ranks):
        assert digests(broken, rank).items() >= digests(played / "whole", rank).items()
    resumed = [(event["stage"], event["step"]) for event in events(broken, "resume")]
    assert resumed == [("alignment", 2), ("finetune", 1), ("finetune", 2)]
    assert [(event["stage"], event["step"]) for event in events(broken, "stop")] == [("finetune", 1)]
    # Steps that ran twice agree with themselves too.
    twice = [line for line in lines(broken) if "event" not in line]
    assert len(twice) == 8 + 2
    assert not list((broken / "checkpoints").glob(".partial-*"))


def test_a_folder_that_is_not_whole_is_set_aside(played: Played) -> None:
    names = {path.name for path in (played / "broken" / "checkpoints").iterdir()}
    assert {"0-alignment-0000004", "broken-0-alignment-0000004"} <= names
    (event,) = events(played / "broken", "set_aside")
    assert (event["checkpoint"], event["to"]) == ("0-alignment-0000004", "broken-0-alignment-0000004")


def test_nan_gradient_changes_nothing_but_the_count(played: Played) -> None:
    run = played / "nan"
    assert [line["updated"] for line in steps(run).values()] == [True] * 5 + [False] * 2 + [True]
    reasons = ["gradient norm not finite", "no token to learn from"]
    assert [line["not_updated"] for line in steps(run).values()] == [*[None] * 5, *reasons, None]
    assert [(event["step"], event["reason"]) for event in events(run, "not_updated")] == [*enumerate(reasons, 1)]
    assert steps(run)["finetune", 1]["grad_norm"] is None and steps(run)["finetune", 2]["grad_norm"] == 0
    for rank in range(played.num_ranks):
        found = digests(run, rank)
        assert found["finetune", 1] == found["finetune", 2] == found["finetune", 3] != found["finetune", 4]
    progress = (run / "checkpoints" / "1-finetune-0000004" / "progress.json").read_text()
    assert '"num_skipped_updates": 2, "num_broken_updates": 0, "broken_since": null' in progress


def too_fast(written: dict[str, Any]) -> dict[str, Any]:
    """Fine-tuning alone, whose first update breaks the weights for good."""
    stage = {**written["stages"][1], "steps": 20, "optimizer": {"lr": 1e30}}
    settings = {"checkpoint": {"interval_steps": 1, "keep_last": 2}, "guard": {"max_broken_updates": 4}}
    return {**written, "stages": [stage], **settings}


def test_a_run_that_diverged_stops_and_keeps_what_was_before(played: Played) -> None:
    run = played / "diverging"
    line = stagehand.told(played.outputs, "updates in a row")
    assert line.startswith("stage finetune: 4 updates in a row were not applied, the first at step 1, ")
    assert line.endswith("; the newest checkpoint from before is 0-finetune-0000001")
    assert [line["updated"] for line in steps(run).values()] == [True] + [False] * 4
    (event,) = events(run, "not_updated")
    assert (event["stage"], event["step"]) == ("finetune", 1)
    warning = f"megatron-sts: warning: stage finetune, step 1: not updated: {event['reason']}"
    assert warning in played.outputs[0].splitlines() and warning not in played.outputs[1]
    left = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert left == ["0-finetune-0000001", "0-finetune-0000003", "0-finetune-0000004"]


def test_full_disk(played: Played) -> None:
    """One save that cannot be written is a warning; two in a row, if no more are allowed, end the run."""
    why, left = "could not be written (rank 1: File too large)", "; 0-alignment-0000002 is intact"
    line = stagehand.told(played.outputs, f"checkpoint 1-finetune-0000002 {why}")
    assert line.startswith(
        f"checkpoint 1-finetune-0000002 {why}, nor could the 1 before it{left}, and the same command goes on"
    )
    warnings = [line for line in played.outputs[0].splitlines() if "warning: checkpoint" in line]
    goes_on = "training goes on, and stops if {} more in a row cannot be written"
    told = [
        f"megatron-sts: warning: checkpoint 0-alignment-0000004 {why}{left}; {goes_on.format(more)}" for more in (2, 1)
    ]
    assert warnings == told and not [line for line in played.outputs[1].splitlines() if "warning: checkpoint" in line]
    assert [event["checkpoint"] for event in events(played / "full", "resume")] == ["0-alignment-0000002"]
    for run in ("crowded", "full"):
        assert steps(played / run) == steps(played / "whole")
    assert [event["step"] for event in events(played / "crowded", "checkpoint_failed")] == [4]
    names = {path.name for path in (played / "crowded" / "checkpoints").iterdir()}
    assert names == {"0-alignment-0000002", "1-finetune-0000002", "1-finetune-0000004"}


def test_bad_samples_are_skipped_and_told_once(played: Played) -> None:
    run = played / "bad"
    told = [(event["key"], event["reason"]) for event in events(run, "skipped_sample")]
    assert sum(line["samples_skipped"] for line in steps(run).values()) == len(told) == 120 // 15 * 7
    for key, reason in told:
        assert stagehand.SAMPLES[key] in reason
    assert {key for key, _ in told} == set(stagehand.SAMPLES) - {"good"}
    assert all(line["updated"] and line["loss"] for line in steps(run).values())
    warnings = [[line for line in output.splitlines() if "skipped sample" in line] for output in played.outputs]
    assert warnings[1] == []
    assert len(warnings[0]) == 2 * len(told)  # of two runs


def test_too_many_bad_samples(played: Played) -> None:
    line = stagehand.told(played.outputs, "max_bad_fraction")
    assert line.startswith("stage finetune: 56 of 120 samples could not be used")


@pytest.fixture(scope="session")
def other_layout(played: Played) -> Path:
    """The whole run's state after fine-tuning's second step, gone on with in another layout."""
    is_pipeline = "pipeline_model_parallel_size" in played.written["parallel"]
    parallel = {"tensor_model_parallel_size": 2, "use_distributed_optimizer": True}
    written = {**played.written, "parallel": {"timeout_s": 100} if is_pipeline else {"timeout_s": 100, **parallel}}
    run = played / "moved"
    shutil.copytree(played / "whole", run)
    shutil.rmtree(run / "checkpoints" / "1-finetune-0000004")
    assert act(1 if is_pipeline else 2, scene(run, written)) == [[0]] * (1 if is_pipeline else 2)
    return run


def test_other_layout_goes_on(played: Played, other_layout: Path) -> None:
    moved, whole = steps(other_layout), steps(played / "whole")
    assert [event["step"] for event in events(other_layout, "resume")] == [2]
    for step in (("finetune", 2), ("finetune", 3)):
        # fp32 sums in another order; the planted error of a lost moment is 1e-2.
        assert moved[step]["loss"] == pytest.approx(whole[step]["loss"], rel=1e-5)
        assert moved[step]["grad_norm"] == pytest.approx(whole[step]["grad_norm"], rel=1e-4)
