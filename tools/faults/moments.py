"""When a fault comes, and to which run. Knows no faults."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

NUM_STEPS, INTERVAL_STEPS = 12, 3
"""Of every run, and between its checkpoints."""
STALL_S = 5.0
"""``parallel.timeout_s`` of runs in which a rank stalls."""


@dataclass(frozen=True)
class Moment:
    """When and where a fault comes: at the ``number``-th mark of ``phase`` in ``step`` on ``rank``."""

    rank: int
    step: int
    phase: str
    number: int
    delay_s: float
    """From the mark to what is done from outside."""
    said_in: Path
    """Where the rank writes the time of the mark."""

    def say(self) -> None:
        """It has come."""
        partial_path = self.said_in.with_suffix(f".{os.getpid()}")
        partial_path.write_text(repr(time.time()))
        partial_path.rename(self.said_in)


@dataclass(frozen=True)
class Running:
    """A run that is to be disturbed from outside."""

    launcher: int
    ranks: Sequence[int]
    """Process ids."""
    run_dir: Path
    moment: Moment
    start: Callable[[], None]
    """Starts the same command again, beside it."""

    @property
    def rank(self) -> int:
        """The process that the fault is for."""
        return self.ranks[self.moment.rank]

    def everything(self) -> list[int]:
        """All processes of the run, the launcher first: it would speak of the others."""
        found = psutil.Process(self.launcher).children(recursive=True)
        return [self.launcher, *(process.pid for process in found)]
