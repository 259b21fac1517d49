"""The processes that train a sweep's runs, and what a signal to the sweep does with them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import FrameType

from megatron_sts.launch.fork import heard

STOPPED = (128 + signal.SIGTERM, -signal.SIGTERM)
"""What a run's process returns that ended because it was asked to."""
GRACE_S = 60.0
"""A run that was asked to save and end has so long: its launcher gives its ranks less."""


@dataclass(frozen=True)
class Ended:
    """How a run's process did."""

    status: int
    is_stopped: bool = False
    """By the sweep, which was stopped: it ended when it was asked to, or was killed. One that failed meanwhile is not."""


class Processes:
    """Runs' processes. A signal that ends the sweep asks each of them to save and end, and keeps others from starting. They are
    killed where they have not within ``GRACE_S``, or by Ctrl-C after that signal: batch systems repeat theirs, people mean it."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = Lock()
        self._deadline = float("inf")
        self.stopped_by: int | None = None
        """The first signal."""

    @contextmanager
    def obeying_signals(self) -> Iterator[None]:
        """While the block runs; of the main thread. SIGUSR1, which batch systems send before they kill, is one of them."""
        before = {number: signal.signal(number, self._stop) for number in (*heard(), signal.SIGUSR1)}
        mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])  # whoever started us may hold it
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, command: Sequence[str], log: Path, tell_start: Callable[[], None] = lambda: None) -> Ended | None:
        """None where the sweep was stopped before it could start. Calls ``tell_start`` once it has. What it prints is
        added to ``log``, whose folder is made."""
        with self._lock:
            if self.stopped_by is not None:
                return None
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                # In a group of its own: Ctrl-C reaches it through us alone, once. SIGUSR1 waits until it is ready for it.
                mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, process_group=0)
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._running.add(process)
        tell_start()
        is_killed = False
        while True:
            try:
                status = process.wait(timeout=1)
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() > self._deadline:
                    process.kill()  # its ranks end with it
                    is_killed = True
        with self._lock:
            self._running.discard(process)
        is_asked = self.stopped_by is not None and status in STOPPED
        return Ended(status, is_stopped=status != 0 and (is_asked or is_killed))

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        if self.stopped_by is not None:
            if number in (signal.SIGINT, signal.SIGQUIT):
                self._deadline = 0.0
            return
        self.stopped_by, self._deadline = number, time.monotonic() + GRACE_S
        with self._lock:  # of other threads, as this is the main one
            for process in self._running:
                process.send_signal(signal.SIGTERM)
            told = f"megatron-sts: {signal.Signals(number).name}: runs save and end; Ctrl-C ends them at once\n"
        with suppress(OSError):  # the terminal may be gone
            os.write(2, told.encode())
