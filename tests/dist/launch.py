"""Runs a function or a script on several local processes, as torchrun would, under a hard time limit.

Nothing of the parent's torch state reaches the ranks, which are forked from a process that has only imported (``tests/warm``),
and no rank outlives the call.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests import warm

REPOSITORY = Path(__file__).resolve().parents[2]
GRACE_S = 5.0
"""After the first rank failed the others get this long to end on their own, so that their output tells why."""


class RanksFailed(AssertionError):
    """A rank failed or the time limit was reached. ``outputs`` and ``returncodes`` are in rank order."""

    def __init__(self, reason: str, outputs: list[str], returncodes: list[int | None]) -> None:
        self.outputs, self.returncodes = outputs, returncodes
        ranks = enumerate(zip(outputs, returncodes, strict=True))
        tails = [f"--- rank {rank}, exit {code}:\n{output[-3000:]}" for rank, (output, code) in ranks]
        super().__init__("\n".join([reason, *tails]))


def run_ranks(target: Callable[[], object] | str | Path, num_ranks: int, timeout_s: float, **env: object) -> list[str]:
    """Runs ``target`` on ``num_ranks`` processes; returns what each printed (stdout and stderr), in rank order.

    ``target`` is a script's path or a module-level function without arguments, which is imported from its file; ranks
    read RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT and the given ``env`` from their environment.
    Raises RanksFailed when a rank exits with an error (the others are ended after GRACE_S) or at ``timeout_s``.
    """
    command = [sys.executable, *([str(target)] if isinstance(target, str | Path) else _function_arguments(target))]
    port = _free_port()
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{rank}.log" for rank in range(num_ranks)]
        ranks = [_start(command, rank, num_ranks, port, log, env) for rank, log in enumerate(logs)]
        try:
            reason = _wait(ranks, time.monotonic() + timeout_s, timeout_s)
            returncodes = [rank.poll() for rank in ranks]
        finally:
            for rank in ranks:
                _kill(rank)
        outputs = [log.read_text(errors="replace") for log in logs]
    if reason is not None:
        raise RanksFailed(reason, outputs, returncodes)
    return outputs


def _function_arguments(function: Callable[[], object]) -> list[str]:
    return [__file__, function.__code__.co_filename, function.__name__]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _start(
    command: list[str], rank: int, num_ranks: int, port: int, log: Path, env: dict[str, object]
) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    world = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=num_ranks, LOCAL_WORLD_SIZE=num_ranks)
    place = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS=1, PYTHONPATH=path)
    settings = {key: str(value) for key, value in {**world, **place, "PYTHONUNBUFFERED": 1, **env}.items()}
    with log.open("wb") as out:
        return warm.Popen(
            command, env={**os.environ, **settings}, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )


def _wait(ranks: list[subprocess.Popen[bytes]], deadline: float, timeout_s: float) -> str | None:
    """Waits for all ranks; the reason to give up, or None when all ended well."""
    failed: int | None = None
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        if failed is None and (failed := _first_failed(ranks)) is not None:
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.02)
    if failed is None:
        failed = _first_failed(ranks)
    if failed is not None:
        return f"rank {failed} of {len(ranks)} failed"
    running = [number for number, rank in enumerate(ranks) if rank.poll() is None]
    return f"ranks {running} of {len(ranks)} still ran after {timeout_s:g} s" if running else None


def _first_failed(ranks: list[subprocess.Popen[bytes]]) -> int | None:
    return next((number for number, rank in enumerate(ranks) if rank.poll()), None)


def _kill(rank: subprocess.Popen[bytes]) -> None:
    """Ends the rank and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(rank.pid, signal.SIGKILL)
    rank.wait()


def _call(file: str, function: str) -> None:
    """In the child: imports ``file`` and calls ``function``."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    getattr(module, function)()


if __name__ == "__main__":
    _call(sys.argv[1], sys.argv[2])
