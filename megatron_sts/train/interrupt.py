"""Remembers that SIGUSR1 or SIGTERM arrived, which batch systems send before they kill: save a checkpoint and end."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from megatron_sts.launch import terminated


class StopRequest:
    """Set by a signal on any rank. Ranks agree on it with their other numbers of a step, so that all stop together."""

    def __init__(self) -> None:
        self.received = 0
        """The signal that this rank got; 0: none."""
        self.agreed: signal.Signals | None = None
        """All ranks know of this one, have saved and stop."""
        self.ends_at = math.inf
        """When this process is killed, by ``time.monotonic``; known after SLURM's SIGTERM."""
        self._pid = os.getpid()
        signal.signal(signal.SIGUSR1, self._remember)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])  # held until now
        terminated.watch(self._told_to_end)

    @contextmanager
    def heeding_term(self) -> Iterator[None]:
        """SIGTERM saves too while the block runs. Before and after it there is nothing to save, and it ends this rank at once."""
        before = signal.signal(signal.SIGTERM, self._remember)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _told_to_end(self) -> None:
        self.ends_at = min(self.ends_at, time.monotonic() + terminated.grace_s())
        self._remember(signal.SIGTERM, None)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() == self._pid:
            self.received = max(self.received, number)
        elif number == signal.SIGTERM:  # a forked helper, which has nothing to save
            os._exit(128 + number)
