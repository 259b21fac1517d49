"""Ranks that fail, stop or differ: one line names the rank, the node and the cause, soon, and nothing is left running."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_sts.cli import main
from megatron_sts.launch import heartbeat, lease, outcome
from tests.commands.test_train import below, children, ends, has_step, outlived, started, wait_for
from tests.dist.launch import RanksFailed, run_ranks
from tests.train import stagehand
from tests.train.stagehand import act_out, events, scene, steps, told

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
    line, remedy = errors
    assert remedy == f"megatron-sts: the same command {outcome.place_to_go_on(run)}"
    assert line.startswith(f"megatron-sts: error: rank 1 ({os.uname().nodename}, pid {rank}) did not answer for ")
    assert "its process is stopped (SIGSTOP?); it was last in stage finetune, step " in line and "SIGKILL" not in line
    assert TIMEOUT_S - 1 < seconds < TIMEOUT_S + 10
    found = outcome.read(run)
    assert found and found.outcome == "failed" and found.cause and line.endswith(found.cause)


def test_sigterm_saves_and_no_new_start_is_asked_for(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with started(config, run, "checkpoint.interval_steps=1000") as process:
        wait_for(has_step(run, "finetune", 3), process)
        everything = below(process)
        os.kill(process.pid, signal.SIGTERM)
        status, _, errors = ends(process, 60)
    assert status == 128 + signal.SIGTERM
    assert not outlived(everything)
    (stop,) = events(run, "stop")
    found = outcome.read(run)
    assert found and (found.outcome, found.cause, found.requeue) == ("stopped", "SIGTERM", False)
    assert stop["signal"] == "SIGTERM" and (found.stage, found.step) == ("finetune", stop["step"])
    saved = run / "checkpoints" / f"1-finetune-{found.step:07d}"
    assert errors == [
        "megatron-sts: stopped by SIGTERM",
        f"megatron-sts: the same command goes on from {saved}",
    ]


def test_a_stop_request_before_any_import_is_kept(config: Path, tmp_path: Path) -> None:
    """The signal comes while a rank of another launcher has not imported torch yet."""
    run, env = (
        tmp_path / "run",
        {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"},
    )
    with socket.create_server(("127.0.0.1", 0)) as probe:
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    command = [sys.executable, "-m", "megatron_sts", "train", str(config), "--run-dir", str(run)]
    one = "parallel.pipeline_model_parallel_size=1"
    with subprocess.Popen(
        [*command, one], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for(lambda: blocks(process.pid, signal.SIGUSR1), process)
        has_torch = "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
        process.send_signal(signal.SIGUSR1)
        out, err = process.communicate(timeout=200)
    assert process.returncode == 0 and not has_torch, err
    assert "asked to stop: saved 1 of 4 steps of stage alignment" in out
    found = outcome.read(run)
    assert found and (found.outcome, found.step, found.requeue) == ("stopped", 1, True)


def blocks(pid: int, number: signal.Signals) -> bool:
    """Whether the process holds the signal back."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(next(line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")), 16)
    return bool(mask >> (number - 1) & 1)


def test_two_starts_in_one_folder(config: Path, tmp_path: Path) -> None:
    """Of other launchers, whose ranks each know only their own run: the second is refused and the first trains on."""
    run = tmp_path / "run"
    with started(config, run) as process:
        wait_for(has_step(run, "alignment", 1), process)

        with pytest.raises(RanksFailed) as failed:
            run_ranks(second_start, 2, timeout_s=100, CONFIG=config, RUN_DIR=run)
        outputs = failed.value.outputs
        assert process.poll() is None and outcome.read(run) is None
        before = len(steps(run))
        wait_for(lambda: len(steps(run)) > before, process)
    (line,) = [line for output in outputs for line in output.splitlines() if "error" in line]
    assert line.startswith(
        f"megatron-sts: error: rank 0: --run-dir={run}: another run is writing it ({os.uname().nodename}, pid "
    )
    assert failed.value.returncodes == [2, 2]


def second_start() -> None:
    sys.exit(main(["train", os.environ["CONFIG"], "--run-dir", os.environ["RUN_DIR"]]))


def test_a_run_that_lost_its_folder_stops_before_a_checkpoint_gets_its_name(tmp_path: Path) -> None:
    path, run = tmp_path / "one.yaml", tmp_path / "run"
    written = stagehand.config(checkpoint={"interval_steps": 5})
    written["stages"][1]["steps"] = 2000
    path.write_text(yaml.safe_dump(written))
    with started(path, run) as process:
        wait_for(has_step(run, "finetune", 6), process)
        other = replace(lease.read(run), token="other", host="nodeb", machine="another-boot pid:[1]", pid=7)  # type: ignore[type-var]
        lease._write(run, other)
        names = {path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith(".")}
        status, _, errors = ends(process, 60)
    assert status == 1
    (line,) = errors
    assert line.startswith(
        f"megatron-sts: error: rank 0 (exit code 1): --run-dir={run}: another start (nodeb, pid 7) has taken it"
    )
    left = {path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith(".")}
    assert len(left - names) <= 1  # one that was about to get it
    assert lease.read(run) == other and outcome.read(run) is None
