"""Remembers that SIGUSR1 arrived, which SLURM sends before the time limit: save a checkpoint and end."""

from __future__ import annotations

import signal
from types import FrameType

from megatron_sts.launch import terminated


class StopRequest:
    """Set by SIGUSR1 on any rank. Ranks agree on it with their other numbers of a step, so that all stop together."""

    def __init__(self) -> None:
        self.received = False
        """This rank got the signal."""
        self.agreed = False
        """All ranks know, have saved and stop."""
        signal.signal(signal.SIGUSR1, self._remember)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])  # our launcher held it until now
        terminated.watch(self._told_to_end)

    def _told_to_end(self) -> None:
        self.received = True

    def _remember(self, _signal: int, _frame: FrameType | None) -> None:
        self.received = True
