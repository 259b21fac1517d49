"""Starts the ranks of a local run, which end with it, and says in one line why one failed. Must not know what a rank does."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megatron_sts.launch.failure import LAUNCHED

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

FATAL_SIGNALS = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}
"""A rank that died of one of these did not follow another: the launcher itself sends SIGTERM."""


def launch_local(argv: Sequence[str], nproc: int) -> int:
    """Run ``python -m megatron_sts ARGV`` on ``nproc`` local ranks until all have ended; returns the exit status."""
    _prepare_environment(nproc)
    # Everything torchelastic has to say about a failure is in the exception; its log would bury the one line.
    logging.disable(logging.CRITICAL)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        run_id="megatron-sts",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
    )
    signal.signal(signal.SIGUSR1, _forward)
    try:
        elastic_launch(config, sys.executable)("-m", "megatron_sts", *argv)
    except ChildFailedError as error:
        return _explain(error.failures)
    except SignalException as error:
        print(f"megatron-sts: stopped by {signal.Signals(error.sigval).name}", file=sys.stderr)
        return 128 + error.sigval
    return 0


def _forward(sig: int, _frame: FrameType | None) -> None:
    """Hands a signal to the ranks, which are this process's children."""
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), sig)


def _prepare_environment(nproc: int) -> None:
    """Ranks share the cores, and leave the one line about a user's mistake to us."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    os.environ[LAUNCHED] = str(os.getpid())


def _explain(failures: Mapping[int, ProcessFailure]) -> int:
    """Print one line for the rank that failed first; its exit status if that says bad config, else 1."""
    rank, failure = min(failures.items(), key=lambda item: _order(item[1]))
    print(f"megatron-sts: error: {describe_failure(rank, failure)}", file=sys.stderr, flush=True)
    return 2 if failure.exitcode == 2 else 1


def _order(failure: ProcessFailure) -> tuple[int, float]:
    """Smallest for the cause. Ranks that lost a peer fail too, often before that peer is reaped; others we ended."""
    died = -failure.exitcode in FATAL_SIGNALS
    kind = 0 if died else 1 if failure.exitcode > 0 else 2
    return kind, _words(failure).get("time", float(failure.timestamp))


def _words(failure: ProcessFailure) -> dict[str, float]:
    message = failure.message
    return message["extraInfo"] if isinstance(message, dict) else {}


def describe_failure(rank: int, failure: ProcessFailure) -> str:
    """Which rank, how it ended, and its last error line."""
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"rank {rank} was killed by {name}{hint}"
    message = failure.message
    if isinstance(message, dict):
        return f"rank {rank} (exit code {failure.exitcode}): {message['message']}"
    return f"rank {rank} ended with exit code {failure.exitcode}; its output is above"
