"""Which of the ranks that failed is the cause, and what is said about it. Must not know torch."""

from __future__ import annotations

import json
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Failure:
    """A rank that did not end well."""

    rank: int
    exitcode: int
    """Negative: the signal that ended it."""
    seen: float
    """When the launcher saw it, in seconds since the epoch."""
    words: dict[str, Any]
    """What it left in its file, see ``failure.leave_words``; empty if nothing."""
    is_ended: bool = False
    """The launcher itself killed it."""
    place: str = ""
    """Where it was, if that is known."""

    @property
    def order(self) -> tuple[int, float]:
        """Smallest for the cause: one that died, then errors of a rank's own, then those that lost a peer, then those we ended."""
        if self.words:
            kind = 2 if self.is_lost else 1
        else:
            kind = 3 if self.is_ended else 0 if self.exitcode < 0 else 1
        return kind, self.words["time"] if self.words else self.seen

    @property
    def is_lost(self) -> bool:
        """Whether it is known only that another rank did not come."""
        return bool(self.words) and bool(self.words["is_lost"])

    def describe(self) -> str:
        """Which rank, how it ended, and its last error line."""
        if self.words:
            message = str(self.words["message"])
            is_about_another = self.is_lost and message.startswith("rank ")
            return message if is_about_another else f"rank {self.rank} (exit code {self.status}): {message}"
        if self.is_ended:
            return f"rank {self.rank} was ended with the others"
        if self.exitcode < 0:
            name = signal.Signals(-self.exitcode).name
            hint = " (out of memory?)" if name == "SIGKILL" else ""
            return (
                f"rank {self.rank} was killed by {name}{hint}{f'; it was last in {self.place}' if self.place else ''}"
            )
        return f"rank {self.rank} ended with exit code {self.exitcode}; its output is above"

    @property
    def status(self) -> int:
        """Its exit status; of one that was ended while it told what went wrong, what that would have been."""
        return int(self.words["status"]) if self.words else self.exitcode


def read_words(path: Path) -> dict[str, Any]:
    """What a rank left in its error file; nothing if it was ended before or while it wrote."""
    try:
        return words_in(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def words_in(data: Any) -> dict[str, Any]:
    """What an error file holds, if a rank of ours wrote it."""
    return (
        data if isinstance(data, dict) and {"message", "time", "is_lost", "is_first", "status"} <= data.keys() else {}
    )


def first(failures: Sequence[Failure]) -> Failure:
    """The cause of the others."""
    return min(failures, key=lambda failure: failure.order)
