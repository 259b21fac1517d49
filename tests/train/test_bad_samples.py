"""When a run ends because its data are unusable: within a stage, at its end, and whatever the limit if nothing was used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sts.config.resolve import ResolvedStage, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.data.records import BadSampleError
from megatron_sts.train.loop import check_bad_samples
from megatron_sts.train.resume import Progress
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
        return check_bad_samples(spec, progress)
    with pytest.raises(BadSampleError) as error:
        check_bad_samples(spec, progress)
    assert str(error.value).startswith(f"stage finetune: {message}")


def test_a_stage_that_used_nothing_fails_at_any_limit(tmp_path: Path) -> None:
    with pytest.raises(BadSampleError, match="none of its 3 samples"):
        check_bad_samples(stage(tmp_path, 1.0), Progress(step=2, num_skipped_samples=3))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_rank_says_that_nothing_was_used(tmp_path: Path) -> None:
    written: dict[str, Any] = config_on(stagehand.write_samples(tmp_path), 1.0)
    path = tmp_path / "samples.json"
    bad = [entry for entry in json.loads(path.read_text()) if entry["id"] in stagehand.SAMPLES]
    path.write_text(json.dumps(bad))
    written["stages"][0]["batch"] |= {"global_batch_size": 4, "micro_batch_size": 2}
    outputs = act_out(2, scene(tmp_path / "run", written | {"parallel": {"timeout_s": 100, "data_parallel_size": 2}}))
    assert stagehand.outcomes(outputs) and all(rank[0]["status"] == 1 for rank in stagehand.outcomes(outputs))
    for rank, output in enumerate(outputs):
        (line,) = [line for line in output.splitlines() if "error" in line]
        assert line.startswith(f"megatron-sts: error: rank {rank}: stage finetune: none of its 8 samples could be used")
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
