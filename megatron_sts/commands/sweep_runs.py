"""The processes that train a sweep's runs, and what a signal to the sweep does with them."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from types import FrameType

from megatron_sts.launch.fork import heard


class Processes:
    """Runs' processes. A signal that ends the sweep asks each of them to save and end, and keeps others from starting."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = Lock()
        self.stopped_by: int | None = None
        """The signal."""

    @contextmanager
    def obeying_signals(self) -> Iterator[None]:
        """While the block runs; of the main thread."""
        before = {number: signal.signal(number, self._stop) for number in heard()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def run(self, command: Sequence[str], log: Path) -> int | None:
        """Its exit status; None where the sweep was stopped before it could start. What it prints is added to ``log``."""
        with log.open("a") as file:
            with self._lock:
                if self.stopped_by is not None:
                    return None
                # In a group of its own: Ctrl-C reaches it through us alone, once.
                process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, process_group=0)
                self._running.add(process)
            status = process.wait()
        with self._lock:
            self._running.discard(process)
        return status

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        is_first, self.stopped_by = self.stopped_by is None, number
        if is_first:  # a second one would interrupt their saving
            with self._lock:  # of other threads, as this is the main one
                for process in self._running:
                    process.send_signal(signal.SIGTERM)
