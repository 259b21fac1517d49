"""Jobs of the tests on a real SLURM: launched, waited for, and read.

``STAND_IN`` is a Python that only writes down what it was started with.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sts.cli import main
from megatron_sts.report.fields import MEASURED
from tests import warm

QUICKSTART = str(Path(__file__).parents[2] / "examples/quickstart")
STAND_IN = """#!{python}
import json, os, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[-1])
own = {{key: value for key, value in os.environ.items() if key.startswith(("STS_", "SLURM_", "MASTER_", "OMP_", "NCCL_"))}}
(run / f"task-{{own['SLURM_JOB_ID']}}-{{own['SLURM_PROCID']}}.json").write_text(json.dumps([sys.argv[1:], own]))
kind, requeue, status = os.environ.get("PLAY", "done,false,0").split(",")
if kind == "chain":
    kind = "done" if "STS_CHAINED" in own else "stopped"
if kind == "lost":  # its node, then the time limit came, then it went well
    kind = {{"0": "lost", "1": "stopped"}}.get(own.get("SLURM_RESTART_COUNT", "0"), "done")
if kind == "hangs":  # the second node's task, in the first start
    kind = "done"
    if own.get("SLURM_RESTART_COUNT", "0") == "0":
        if own["SLURM_NODEID"] == "0":
            os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
        time.sleep(5)
if kind == "save":
    kind = "done"
    if own.get("SLURM_RESTART_COUNT", "0") == "0":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        (run / "ready").touch()
        signal.sigwait([signal.SIGUSR1])
        kind, requeue = "stopped", "true"
if own["SLURM_PROCID"] == "0":
    told = {{"outcome": kind, "requeue": requeue == "true", "time": ""}}
    if kind == "lost":
        told |= {{"outcome": "failed", "nodes": [os.environ["SLURMD_NODENAME"]]}}
    (run / "outcome.json").write_text(json.dumps(told))
sys.exit(int(status))
"""
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


def launch(*words: str, gpus: int = 0, ranks: int = 1, nodes: int = 2) -> None:
    place = ["--nodes", str(nodes), "--gpus-per-node", str(gpus), "--ranks-per-node", str(ranks)]
    assert main(["launch", "slurm", QUICKSTART, *place, *words]) == 0


def submitted(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The jobs that ``launch`` said it submitted."""
    found = re.search(r"^megatron-sts: job ([\d, ]+): ", capsys.readouterr().out, re.M)
    assert found
    return found[1].split(", ")


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.1)
    return found


def state(job: str) -> str:
    return subprocess.run(
        ["squeue", "-h", "-t", "all", "-j", job, "-o", "%T"], capture_output=True, text=True
    ).stdout.strip()


def end_of(job: str, log: Path | None = None) -> str:
    """The job's last state."""

    def over() -> str:
        return now if (now := state(job)) in OVER else ""

    try:
        return wait_for(over, f"job {job} does not end")
    except AssertionError:
        raise AssertionError(f"job {job} is {state(job)}: {log.read_text() if log else ''}") from None


def tell(*words: str) -> None:
    subprocess.run(["scancel", *words], check=True)


def tasks(run: Path, job: str) -> list[tuple[list[str], dict[str, str]]]:
    return [json.loads(path.read_text()) for path in sorted(run.glob(f"task-{job}-*.json"))]


def local_run(run: Path, config: str, *overrides: str) -> dict[tuple[str, int], dict[str, Any]]:
    """The numbers of a run that is never interrupted, on local ranks."""
    words = [sys.executable, "-m", "megatron_sts", "train", config, *overrides, "--run-dir", str(run)]
    warm.run(words, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True, timeout=300)
    return numbers(run)


def lines(run: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (FileNotFoundError, ValueError):  # a line that is being written
        return []


def numbers(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """What each step came to, but for times; the last line of a step counts."""
    steps = (line for line in lines(run) if "event" not in line)
    return {(line["stage"], line["step"]): {key: line[key] for key in line.keys() - MEASURED} for line in steps}


def wait_for_step(run: Path, step: int) -> None:
    wait_for(lambda: ("finetune", step) in numbers(run), f"step {step} does not come: {log_of(run)}")


def log_of(run: Path) -> str:
    return "\n".join(path.read_text() for path in sorted(run.glob("launch/*/job-*.out")))


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [line for line in lines(run) if line.get("event") == kind]
