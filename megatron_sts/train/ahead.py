"""Calls that run one after the other in a thread, while their caller does something else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread


class Ahead[T]:
    """One thread for a function's calls.

    Not a ``ThreadPoolExecutor``: data loaders fork their workers from this thread, and the exit handler of
    ``concurrent.futures`` would fail in each of them. A daemon, so that a failing rank ends although a read blocks.
    """

    def __init__(self, function: Callable[[int], T], name: str) -> None:
        self._function = function
        self._asked: SimpleQueue[tuple[int, Future[T]] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, number: int) -> Future[T]:
        """Asks for ``function(number)``, after all calls asked for before."""
        future: Future[T] = Future()
        self._asked.put((number, future))
        return future

    def close(self, timeout_s: float) -> None:
        """Waits for the calls asked for, at most so long, and ends the thread."""
        self._asked.put(None)
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while (asked := self._asked.get()) is not None:
            number, future = asked
            try:
                future.set_result(self._function(number))
            except BaseException as error:  # raised again where the result is taken
                future.set_exception(error)
