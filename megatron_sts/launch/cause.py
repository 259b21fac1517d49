"""Which of the ranks that failed is the cause, and what is said about it. Must not know torch."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FATAL_SIGNALS = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE}
"""A rank that died of one of these did not follow another: the launcher itself sends SIGTERM."""


@dataclass(frozen=True)
class Failure:
    """A rank that did not end well."""

    rank: int
    exitcode: int
    """Negative: the signal that ended it."""
    seen: float
    """When the launcher saw it, in seconds since the epoch."""
    words: dict[str, Any]
    """What it left in its file, see ``failure.report``; empty if nothing."""

    @property
    def order(self) -> tuple[int, float]:
        """Smallest for the cause. Ranks that lost a peer fail too, often before that peer is reaped; others we ended."""
        died = -self.exitcode in FATAL_SIGNALS
        kind = 0 if died else 1 if self.exitcode > 0 else 2
        return kind, self.words["extraInfo"]["time"] if self.words else self.seen

    def describe(self) -> str:
        """Which rank, how it ended, and its last error line."""
        if self.exitcode < 0:
            name = signal.Signals(-self.exitcode).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return f"rank {self.rank} was killed by {name}{hint}"
        if self.words:
            return f"rank {self.rank} (exit code {self.exitcode}): {self.words['message']}"
        return f"rank {self.rank} ended with exit code {self.exitcode}; its output is above"


def read_words(path: Path) -> dict[str, Any]:
    """What a rank left in its error file; nothing if it was ended before or while it wrote."""
    try:
        words: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["message"]
    except (OSError, ValueError):
        return {}
    return words


def first(failures: Sequence[Failure]) -> Failure:
    """The cause of the others."""
    return min(failures, key=lambda failure: failure.order)
