"""Remembers that SIGUSR1 arrived, which SLURM sends before the time limit: save a checkpoint and end."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Set by SIGUSR1 on any rank. Ranks agree on it with their other numbers of a step, so that all stop together."""

    def __init__(self) -> None:
        self.received = False
        """This rank got the signal."""
        self.agreed = False
        """All ranks know, have saved and stop."""
        signal.signal(signal.SIGUSR1, self._remember)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])  # our launcher held it until now

    def _remember(self, _signal: int, _frame: FrameType | None) -> None:
        self.received = True
