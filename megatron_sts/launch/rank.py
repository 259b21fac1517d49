"""This process is one rank, of our launcher, torchrun or srun: it does its work and leaves what went wrong to be found."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable
from pathlib import Path

from megatron_sts.launch import environment, failure
from megatron_sts.launch.failure import LAUNCHED

_PR_SET_PDEATHSIG = 1  # of Linux's prctl


def become(rank: environment.Rank, work: Callable[[], None], run_dir: Path | None = None) -> int:
    """Does ``work`` as ``rank``; returns 0, or ends this process with the status of what went wrong."""
    environment.join(rank, os.environ)
    return act(work, run_dir)


def act(work: Callable[[], None], run_dir: Path | None = None) -> int:
    """Does ``work``; returns 0, or ends this process with the status of what went wrong."""
    status = attempt(work, run_dir)
    return failure.leave(status) if status else 0


def attempt(work: Callable[[], None], run_dir: Path | None = None) -> int:
    """Does ``work``, and reports an error of it where the launcher and readers of ``run_dir`` look; returns the exit status."""
    follow_launcher()
    try:
        work()
    except Exception as error:
        return failure.report(error, run_dir)
    return 0


def follow_launcher() -> None:
    """Has the kernel end this rank when the launcher that started it dies, even by SIGKILL: it would train on unseen.

    By SIGKILL: a rank that hangs, is stopped, or was forked with another's handlers ends too; it has nothing to clean up, and
    its own helpers see that it is gone (``launch.follow``). The kernel means the launcher's thread that started this rank.
    Ctrl-C ends it without a traceback: the launcher says it.
    """
    if LAUNCHED in os.environ:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
        if os.getppid() != int(os.environ[LAUNCHED]):  # dead already
            os.kill(os.getpid(), signal.SIGKILL)
