"""How far long work is, as plain lines, where the console shows no progress bar. Must not know what the work is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from rich.progress import Progress

INTERVAL_S = 30.0
"""Between lines: a job of a day writes less than 3,000."""


class ProgressLines:
    """Stands beside a bar, for one task. rich draws bars on terminals alone: in a file they appear once they have stopped."""

    def __init__(self, bar: Progress, name: str, total: int, now_s: Callable[[], float] = time.monotonic) -> None:
        """``bar``: where it shows, or is disabled, nothing is said; lines go where it would, to stdout or stderr. ``name``: what is
        counted, up to ``total``."""
        shows = bar.console.is_terminal and not bar.console.is_dumb_terminal
        self._to_stderr = bar.console.stderr
        self._is_needed = not (shows or bar.disable)
        self._name, self._total, self._now_s = name, total, now_s
        self._first: tuple[float, int] | None = None
        self._told_s = 0.0

    def tell(self, done: int, *details: str) -> None:
        """Prints the first call's line, and a later one's once ``INTERVAL_S`` have passed since the last line.

        The time that is left goes by the mean pace since the first call, which had to warm up. A full disk costs the line alone.
        """
        if not self._is_needed:
            return
        now = self._now_s()
        if self._first is None:
            self._first = now, done
        elif now - self._told_s < INTERVAL_S:
            return
        self._told_s = now
        first_s, first_done = self._first
        if done > first_done:
            left_s = (now - first_s) / (done - first_done) * (self._total - done)
            details = (*details, f"{timedelta(seconds=round(left_s))} left")
        with suppress(OSError):
            print(
                f"megatron-sts: {', '.join((f'{self._name} {done}/{self._total}', *details))}",
                file=sys.stderr if self._to_stderr else sys.stdout,
                flush=True,
            )
