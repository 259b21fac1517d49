"""A rank whose SIGTERM is held back asks who sent it. Must not know torch.

Its launcher stops it with SIGTERM when a peer is gone: it ends at once, because saving together is over. SLURM tells every
process of a step to end with SIGTERM (``scancel``, preemption, the time limit), and kills what is left later: the run may
still save. Which of both it was, only the sender's process id says.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

TERM_IS_HELD = "MEGATRON_STS_TERM_IS_HELD"
"""Set by the task that starts ranks: SIGTERM is blocked in every thread from the start."""
GRACE = "STS_GRACE_S"
"""Seconds between SLURM's SIGTERM and its SIGKILL."""
DEFAULT_GRACE_S = 30.0


def watch(told: Callable[[], None]) -> None:
    """Calls ``told``, from a thread, when SLURM says that this rank should end; ends it when its launcher says so."""
    if TERM_IS_HELD in os.environ:
        threading.Thread(target=_wait, args=(os.getppid(), told), name="terminated", daemon=True).start()


def grace_s() -> float:
    """How long this rank has from SLURM's SIGTERM on."""
    return float(os.environ.get(GRACE, DEFAULT_GRACE_S))


def _wait(launcher: int, told: Callable[[], None]) -> None:
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == launcher and not _is_slurm(launcher):
            os._exit(128 + signal.SIGTERM)
        told()


def _is_slurm(pid: int) -> bool:
    """Whether it is SLURM's own process, the parent of ranks that srun started."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8") as file:
            return file.read().startswith("slurm")
    except OSError:
        return False
