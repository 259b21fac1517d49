"""Ranks that fail, stop or differ: one line names the rank, the node and the cause, soon, and nothing is left running."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from megatron_sts.launch import heartbeat, outcome
from tests.commands.test_train import below, children, ends, has_step, outlived, started, wait_for
from tests.train import stagehand
from tests.train.stagehand import act_out, scene, told

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
TIMEOUT_S = 6.0


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "two.yaml"
    written = stagehand.config(parallel={"pipeline_model_parallel_size": 2, "timeout_s": TIMEOUT_S})
    written["stages"][1]["steps"] = 2000
    path.write_text(yaml.safe_dump(written))
    return path


def test_what_differs_is_named_and_a_rank_that_raises_too(tmp_path: Path) -> None:
    written = stagehand.config(parallel={"pipeline_model_parallel_size": 2, "timeout_s": 60})
    outputs = act_out(
        2,
        scene(tmp_path / "code", written, other="code", fails_together=True),
        scene(tmp_path / "config", written, other="config", fails_together=True),
        scene(tmp_path / "raises", written, **{"raise": [0, 2]}),
    )
    scenes = stagehand.outcomes(outputs)
    assert [[each["status"] for each in rank] for rank in scenes] == [[2, 2, 1]] * 2
    host = os.uname().nodename
    here, there = f"rank 0 ({host})", f"rank 1 ({host})"
    assert told(outputs, "the sources of").startswith(
        f"the sources of megatron_sts differ between {here} and {there}: train/step.py; "
    )
    assert told(outputs, "seed").startswith(f"seed=2: so it is on {there}, but seed=1 on {here}; ")
    assert not list((tmp_path / "code").glob("checkpoints/*")) and not (tmp_path / "code" / "metrics.jsonl").exists()
    for folder, status in (
        ("code", "the sources of"),
        ("config", "seed=2"),
        ("raises", "RuntimeError: layer 3 is broken"),
    ):
        found = outcome.read(tmp_path / folder)
        assert found and found.outcome == "failed" and found.cause and status in found.cause
    assert outputs[1].splitlines()[-2] == "megatron-sts: error: rank 1: RuntimeError: layer 3 is broken"
    assert "[rank 1] Traceback" in outputs[1]
    after = outputs[0].split("SCENE")[3 - 1]
    assert "Traceback" not in after and "error" not in after  # it only lost rank 1
    assert scenes[0][2]["seconds"] < 30
    (folder,) = (tmp_path / "raises" / heartbeat.FOLDER).iterdir()
    trail = (folder / "1.trail.json").read_text()
    assert '"stage": "alignment", "step": 2, "phase": "backward", "microbatch": 0' in trail


def test_a_stopped_rank_is_named(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(config, run, "checkpoint.interval_steps=50") as process:
        wait_for(has_step(run, "finetune", 20), process)
        everything, rank = below(process), children(process.pid)[1]
        os.kill(rank, signal.SIGSTOP)
        stopped = time.monotonic()
        status, _, errors = ends(process, TIMEOUT_S + 10 + 10)
        seconds = time.monotonic() - stopped
    assert status == 1 and not outlived(everything)
    (line,) = errors
    assert line.startswith(f"megatron-sts: error: rank 1 ({os.uname().nodename}, pid {rank}) did not answer for ")
    assert "its process is stopped (SIGSTOP?), in stage finetune, step " in line and "SIGKILL" not in line
    assert TIMEOUT_S - 1 < seconds < TIMEOUT_S + 10
    found = outcome.read(run)
    assert found and found.outcome == "failed" and found.cause and line.endswith(found.cause)
