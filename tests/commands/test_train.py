"""Real ``megatron-sts train`` processes: signals, kills, and what is said when a run is started again."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_sts.launch import outcome
from tests import warm
from tests.train import stagehand
from tests.train.stagehand import events, steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TIMEOUT_S = 240


@contextmanager
def started(config: Path, run_dir: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """A training run in a process group of its own, which does not outlive the block."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in launcher} | {"OMP_NUM_THREADS": "1"}
    process = warm.Popen(
        [sys.executable, "-m", "megatron_sts", "train", str(config), "--run-dir", str(run_dir), *overrides],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        ranks = children(process.pid)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for rank in ranks:  # they lead groups of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGKILL)
        process.wait()


def children(pid: int) -> list[int]:
    """Processes that ``pid`` started."""
    found = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in found for child in path.read_text().split()]


def below(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Everything that a run started: ranks, and what they started."""
    return psutil.Process(process.pid).children(recursive=True)


def outlived(started: list[psutil.Process]) -> list[psutil.Process]:
    """Those that are still there when the run has ended, and have not become zombies."""
    _, left = psutil.wait_procs(started, timeout=30)
    return [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate(timeout=10)
        time.sleep(0.02)


def has_step(run_dir: Path, stage: str, step: int) -> Callable[[], bool]:
    return lambda: (run_dir / "metrics.jsonl").exists() and (stage, step) in steps(run_dir)


def ends(process: subprocess.Popen[str], timeout_s: float = TIMEOUT_S) -> tuple[int, str, list[str]]:
    """Exit status, stdout, and the lines of stderr that are ours."""
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, [line for line in err.splitlines() if line.startswith("megatron-sts:")]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    written = stagehand.config()
    written["stages"][1]["steps"] = 60
    path.write_text(yaml.safe_dump(written))
    return path


def test_one_rank_killed_resumed_finished(config: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    with started(config, run) as process:
        wait_for(has_step(run, "finetune", 3), process)
        [rank] = children(process.pid)
        os.kill(rank, signal.SIGSTOP)  # or it would have ended before the second start looks
        with started(config, run) as second:
            status, _, errors = ends(second, 60)
        assert status == 2
        [line] = errors
        assert line.startswith(f"megatron-sts: error: --run-dir={run}: another run is writing it (")
        assert f", pid {process.pid}); " in line  # of the launcher: who ends a rank loses what it could have saved
        everything = below(process)
        os.kill(process.pid, signal.SIGKILL)  # the kernel ends the rank with it, though that is stopped
        process.wait()
        assert not outlived(everything)
    assert ("finetune", 59) not in steps(run)
    for folder in (run, whole):
        with started(config, folder) as process:
            status, out, _ = ends(process)
            assert status == 0
            assert ("megatron-sts: going on from checkpoint 1-finetune-" in out) == (folder == run)
    assert steps(run) == steps(whole) and len(steps(run)) == 64
    assert [event["stage"] for event in events(run, "resume")] == ["finetune"]
    found = outcome.read(run)
    assert found and (found.outcome, found.stage, found.step, found.cause) == ("done", "finetune", 60, None)
    outcome.clear(run)
    trained = steps(run)
    for _ in range(2):  # at last without its checkpoints
        with started(config, run) as process:
            status, out, errors = ends(process, 60)
        assert (status, errors) == (0, [])
        assert (again := outcome.read(run)) and (again.outcome, again.step) == ("done", 60)
        assert out == f"megatron-sts: the run in {run} is finished; nothing is left to do\n"
        with started(config, run, "stages.finetune.lds.alpha=0.5") as process:
            status, _, errors = ends(process, 60)
        assert status == 2
        assert errors == [
            f"megatron-sts: error: stages.finetune.lds.alpha=0.5: {run} holds a run with stages.finetune.lds.alpha=0.6; "
            "restore that value to go on, or give another --run-dir"
        ]
        shutil.rmtree(run / "checkpoints", ignore_errors=True)
    assert steps(run) == trained


def test_two_ranks_stopped_then_one_dies(tmp_path: Path) -> None:
    path, run = tmp_path / "tiny.yaml", tmp_path / "run"
    written = stagehand.config_on(stagehand.write_samples(tmp_path), 0.9)
    stage = written["stages"][0] | {"steps": 500}
    path.write_text(yaml.safe_dump(written | {"stages": [stage], "parallel": {"data_parallel_size": 2}}))
    with started(path, run) as process:
        wait_for(lambda: list((run / "checkpoints").glob("0*")), process)
        everything, ranks = below(process), children(process.pid)
        for each in everything:
            if each.pid not in ranks:  # a batch system signals them too: the next save must not miss any
                each.send_signal(signal.SIGUSR1)
        os.kill(process.pid, signal.SIGUSR1)  # the launcher hands it on to the ranks
        status, out, errors = ends(process)
    assert status == 0
    assert not outlived(everything)
    (stop,) = events(run, "stop")
    found = outcome.read(run)
    assert found and (found.outcome, found.cause, found.requeue) == ("stopped", "SIGUSR1", True)
    assert (found.stage, found.step) == ("finetune", stop["step"])
    said = f"megatron-sts: asked to stop: saved {stop['step']} of 500 steps of stage finetune; the same command goes on"
    assert said in out.splitlines()
    assert out.count("megatron-sts: stage finetune, step 1/500, loss ") == 1  # no terminal; rank 1 says nothing
    told = events(run, "skipped_sample")
    assert errors == [f"megatron-sts: warning: skipped sample {event['key']}: {event['reason']}" for event in told]
    assert len(told) >= 28
    with started(path, run) as process:
        wait_for(has_step(run, "finetune", stop["step"]), process)
        assert [event["step"] for event in events(run, "resume")] == [stop["step"]]
        assert outcome.read(run) is None
        everything = below(process)
        os.kill(max(children(process.pid)), signal.SIGKILL)
        status, _, errors = ends(process, 60)
    assert status == 1
    assert not outlived(everything)
    (last,) = [line for line in errors if "error" in line]
    found = outcome.read(run)
    assert found and (found.outcome, found.step, found.requeue) == ("failed", stop["step"], False)
    assert found.cause and last == f"megatron-sts: error: {found.cause}"
    assert (
        last.startswith("megatron-sts: error: rank ")
        and " was killed by SIGKILL (out of memory?); it was last in " in last
    )


def test_interrupted_in_one_line(config: Path, tmp_path: Path) -> None:
    with started(config, tmp_path / "run") as process:
        wait_for(has_step(tmp_path / "run", "alignment", 0), process)
        os.kill(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "megatron-sts: stopped by SIGINT" in err.splitlines()
    found = outcome.read(tmp_path / "run")
    assert found and (found.outcome, found.cause, found.requeue) == ("stopped", "SIGINT", False)
    assert "Traceback" not in err


def test_fp8_is_refused_before_ranks_start(config: Path, tmp_path: Path) -> None:
    with started(config, tmp_path / "run", "precision.fp8=tensorwise") as process:
        status, _, errors = ends(process, 120)
    assert status == 2
    (line,) = errors
    assert line.startswith("megatron-sts: error: precision.fp8=tensorwise: ")
    assert not (tmp_path / "run").exists()
