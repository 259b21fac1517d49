"""Starts ranks that have imported everything already: by fork from this process, or fresh ones where that is not safe.

Importing torch and megatron-core takes seconds, which fork pays once for all ranks. Must not know torch.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Literal

Work = Callable[[], int]
"""What a rank does; returns its exit status. Fresh processes need one that can be pickled."""

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals that end a run."""


@contextmanager
def uncollected() -> Iterator[None]:
    """For imports: their objects stay, and looking for garbage among them again and again takes a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def stay_single_threaded() -> None:
    """To be called before numpy is imported, whose OpenBLAS would begin with a thread a core. Ranks do without it too."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def hold_stop_request() -> None:
    """SIGUSR1 waits until somebody is ready for it. To be called before numpy and torch are imported, whose threads would take it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])


def warm_up(modules: Sequence[str]) -> None:
    """Imports ``modules`` for the children to come, whose garbage collectors will never look at what they brought."""
    with uncollected():
        for name in modules:
            importlib.import_module(name)
    gc.freeze()


def heard() -> tuple[signal.Signals, ...]:
    """Those of ``STOPPING`` that end this process: not SIGHUP where it is ignored, as ``nohup`` has it."""
    return tuple(
        number for number in STOPPING if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    )


def start_method() -> Literal["fork", "spawn"]:
    """``fork``, unless this process has threads, whose locks a child would hold for ever, or has begun to use a GPU."""
    is_single = len(os.listdir("/proc/self/task")) == 1
    return "fork" if is_single and not _uses_gpu() else "spawn"


def start(work: Work, environment: Mapping[str, str], method: Literal["fork", "spawn"]) -> BaseProcess:
    """Starts ``work`` in a child with these variables too, within ``signals_held``.

    It leads a process group of its own, so that Ctrl-C is ours, and ends by the signals of ``STOPPING`` without a word.
    SIGUSR1 waits until the child unblocks it: it cannot come too early.
    """
    context = multiprocessing.get_context("fork") if method == "fork" else multiprocessing.get_context("spawn")
    process = context.Process(target=_enter, args=(work, dict(environment)))
    process.start()
    return process


@contextmanager
def signals_held() -> Iterator[None]:
    """Signals wait while the block runs: none can come between a child's start and what is known of it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*STOPPING, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _enter(work: Work, environment: Mapping[str, str]) -> None:
    os.setsid()
    os.environ.update(environment)
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    sys.exit(work())


def _uses_gpu() -> bool:
    """CUDA keeps its device files open from its first call on, and does not work in a child made by fork after that."""
    for link in Path("/proc/self/fd").iterdir():
        try:
            if os.readlink(link).startswith(("/dev/nvidia", "/dev/dxg")):
                return True
        except FileNotFoundError:  # the folder's own
            continue
    return False
