"""Asks SLURM: could this script start, take it, how is it. Must not know torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from megatron_sts.config.errors import ConfigError
from megatron_sts.launch.slurm_refusal import explain

POLL_S = 2.0
OVER = ("", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
"""States of a job that does not go on; SLURM forgets it some minutes after its end."""


def check_startable(script: Path) -> str:
    """What ``sbatch --test-only`` says of the script; sbatch itself accepts jobs that no node can ever run.

    Raises:
        ConfigError: SLURM could not start it.
    """
    done = _sbatch("--test-only", str(script))
    if done.returncode:
        remedy = (
            "ask for nodes, GPUs, CPUs and memory that there are (sinfo), or, if the nodes are only down or drained now, give "
            "--untested to queue it all the same"
        )
        raise ConfigError(explain(done.stderr, "SLURM could not start this job", remedy))
    return " ".join(line.removeprefix("sbatch: ").removeprefix("error: ") for line in done.stderr.splitlines())


def submit(script: Path, *options: str, **environment: str) -> str:
    """Submits the script and returns the job's id.

    Raises:
        ConfigError: sbatch refused it.
    """
    done = _sbatch("--parsable", *options, str(script), **environment)
    if done.returncode:
        raise ConfigError(explain(done.stderr, "sbatch refused this job", "correct what it names"))
    return done.stdout.strip().partition(";")[0]


def follow(job: str, log: Path) -> str:
    """Prints the job's log until the job has left the queue; returns its last state."""
    state, shown = "", 0
    while True:
        now = _state(job)
        if now and now != state:
            print(f"megatron-sts: job {job} is {now}", file=sys.stderr, flush=True)
        state = now or state
        shown += _show(log, shown)
        if now in OVER:
            return state
        time.sleep(POLL_S)


def _show(log: Path, start: int) -> int:
    """Prints the log from byte ``start`` on; how many bytes that were."""
    try:
        with log.open("rb") as file:
            file.seek(start)
            found = file.read()
    except OSError:  # not there yet
        return 0
    sys.stdout.buffer.write(found)
    sys.stdout.flush()
    return len(found)


def _state(job: str) -> str | None:
    """Empty: SLURM has forgotten it. None: it does not answer."""
    command = ["squeue", "--noheader", "--jobs", job, "--states=all", "--format=%T"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return done.stdout.split()[0] if done.stdout.split() else ""


def array_numbers(spec: str) -> Iterator[int]:
    """The numbers of sbatch's ``--array``: ``0-15``, ``1,3,5``, ``0-15:4%2``.

    Raises:
        ConfigError: it is none.
    """
    for part in spec.partition("%")[0].split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part)
        if not found:
            raise ConfigError(f"--array={spec}: {part!r} is neither a number nor a range; write 0-3, 1,5 or 0-15:4%2")
        start = int(found[1])
        yield from range(start, int(found[2] or start) + 1, int(found[3] or 1))


def outcome(run_dir: Path) -> str:
    """What the run said of its end; empty if nothing."""
    try:
        return str(json.loads((run_dir / "outcome.json").read_text(encoding="utf-8"))["outcome"])
    except (OSError, ValueError, KeyError):
        return ""


def _sbatch(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            ["sbatch", *words], capture_output=True, text=True, env={**os.environ, **environment}, errors="replace"
        )
    except FileNotFoundError:
        raise ConfigError(
            "sbatch: no such program here; run this where jobs are submitted from, or look at the script with --dry-run"
        ) from None


def options_of(words: Iterable[str]) -> list[tuple[str, str | None]]:
    """``NAME=VALUE`` or ``NAME``, with or without dashes, as directives."""
    split = (word.lstrip("-").partition("=") for word in words)
    return [(name, value if equals else None) for name, equals, value in split]


def has_pyxis() -> bool:
    """Whether srun knows containers' images."""
    try:
        done = subprocess.run(["srun", "--help"], capture_output=True, text=True)
    except OSError:
        return False
    return "--container-image" in done.stdout
