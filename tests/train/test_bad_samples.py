"""When a run ends because its data are unusable: within a stage, at its end, and whatever the limit if nothing was used."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sts.config.resolve import ResolvedStage, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.data.records import BadSampleError
from megatron_sts.train.metrics import RunLog
from megatron_sts.train.resume import Progress
from megatron_sts.train.stops import bad_samples, going_on
from tests.train import stagehand
from tests.train.stagehand import act_out, config_on, scene


def stage(folder: Path, max_bad_fraction: float) -> ResolvedStage:
    """Two steps."""
    samples = stagehand.write_samples(folder)
    return resolve(RunConfig.model_validate(config_on(samples, max_bad_fraction))).stages[0]


@pytest.mark.parametrize(
    ("step", "used", "skipped", "message"),
    [
        (1, 60, 38, None),  # too few to judge by
        (1, 60, 40, None),
        (1, 59, 41, "41 of 100 samples could not be used, more than data.max_bad_fraction=0.4"),
        (2, 6, 4, None),
        (2, 5, 4, "4 of 9 samples could not be used, more than data.max_bad_fraction=0.4"),
        (1, 0, 9, None),
        (2, 0, 9, "none of its 9 samples could be used"),
    ],
)
def test_share_of_bad_samples(tmp_path: Path, step: int, used: int, skipped: int, message: str | None) -> None:
    progress = Progress(step=step, num_samples=used, num_skipped_samples=skipped)
    spec = stage(tmp_path, 0.4)
    if message is None:
        assert bad_samples(spec, progress) is None
    else:
        assert str(bad_samples(spec, progress)).startswith(f"stage finetune: {message}")


def test_a_stage_that_used_nothing_fails_at_any_limit(tmp_path: Path) -> None:
    message = bad_samples(stage(tmp_path, 1.0), Progress(step=2, num_skipped_samples=3))
    assert str(message).startswith("stage finetune: none of its 3 samples")


def test_where_a_stop_goes_on(tmp_path: Path) -> None:
    strict, lenient, log = (
        stage(tmp_path, 0.4),
        stage(tmp_path, 0.9),
        RunLog(tmp_path, tensorboard=False, enabled=False),
    )
    counted = Progress(step=1, num_samples=60, num_skipped_samples=60, num_skipped_updates=1)
    assert going_on(strict, counted, log) == counted
    stopped = replace(counted, stopped_on_bad_samples=True)
    assert going_on(strict, stopped, log) == Progress(step=1, num_skipped_updates=1)
    # Nothing is left of the stage that mended data could make better.
    at_end = replace(stopped, step=2)
    with pytest.raises(
        BadSampleError, match=r"60 of 120 samples .*delete the stage's last checkpoint or raise the limit"
    ):
        going_on(strict, at_end, log)
    assert going_on(lenient, at_end, log).step == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_bad_data_end_a_run_that_goes_on_once_they_are_mended(tmp_path: Path) -> None:
    written: dict[str, Any] = config_on(stagehand.write_samples(tmp_path), 0.3)
    written |= {"parallel": {"timeout_s": 100, "data_parallel_size": 2}, "checkpoint": {}}
    written["stages"][0]["steps"] = 4
    path, run, useless = tmp_path / "samples.json", tmp_path / "run", tmp_path / "useless"
    entries = json.loads(path.read_text())
    bad = [entry for entry in entries if entry["id"] in stagehand.SAMPLES]
    (missing,) = [entry for entry in bad if entry["id"] == "missing"]
    good = [entry for entry in entries if entry not in bad]
    path.write_text(json.dumps([*good, *[missing] * 8]))
    (tmp_path / "mended.json").write_text(json.dumps([*good, *good]))
    (tmp_path / "bad.json").write_text(json.dumps([entry for entry in bad if entry != missing]))
    none = config_on(tmp_path / "bad.json", 1.0, parallel=written["parallel"])
    none["stages"][0]["batch"] |= {"global_batch_size": 4, "micro_batch_size": 2}
    outputs = act_out(
        2,
        scene(run, written, fails_together=True),
        scene(run, written, mend=[str(tmp_path / "mended.json"), str(path)]),
        scene(useless, none),
    )
    assert [[each["status"] for each in rank] for rank in stagehand.outcomes(outputs)] == [[1, 0, 1]] * 2
    stopped = stagehand.told(outputs, "mend the data")
    assert stopped.startswith("stage finetune: ")
    assert stopped.endswith(" saved at step 2: mend the data or raise the limit, and the same command goes on")
    assert stagehand.told(outputs, "none of its").startswith("stage finetune: none of its 8 samples could be used")
    assert [event["checkpoint"] for event in stagehand.events(run, "checkpoint")] == [
        "0-finetune-0000002",
        "0-finetune-0000004",
    ]
    assert [event["step"] for event in stagehand.events(run, "resume")] == [2]
    assert [line["samples_skipped"] > 0 for line in stagehand.steps(run).values()] == [True, True, False, False]
    assert not list((useless / "checkpoints").glob("*"))
