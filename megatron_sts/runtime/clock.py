"""Where the time of a step goes on this rank, by what it does. A timer costs two readings of a clock, microseconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch

from megatron_sts.runtime.device import current_device

Kind = Literal["data", "forward", "backward", "layer_communication", "pipeline_wait", "communication", "optimizer"]
"""data: waiting for micro-batches, on the host. forward, backward: passes. layer_communication: collectives within them, as far as they wait.
pipeline_wait: for what other stages send and receive, and for the slowest stage at the end. communication: between
data-parallel copies and shared weights, as far as nothing else runs meanwhile. optimizer: finishing gradients, their norm, the update.
"""
KINDS: tuple[Kind, ...] = get_args(Kind)
PASSES: tuple[Kind, ...] = ("forward", "backward")

_Mark = float | torch.cuda.Event
_Timed = tuple[Kind, Kind | None, _Mark, _Mark]
"""What, within what, from when, until when."""


class Span(NamedTuple):
    """A time that was spent on one thing; those within another one lie within it."""

    kind: Kind
    start_s: float
    """Since ``StepClock.begin``."""
    end_s: float


class StepClock:
    """Adds up what is timed. On a GPU by events of its stream: a span then begins when the device has come to it.

    A span within another one counts for itself alone.
    """

    def __init__(self) -> None:
        self._open: list[Kind] = []
        self._spans: list[_Timed] = []
        self._taken: list[_Timed] = []
        self.begin()

    def begin(self) -> None:
        """Where ``spans`` begin to count."""
        self._began: tuple[_Mark, _Mark] = time.perf_counter(), _now("forward")

    @property
    def is_in_pass(self) -> bool:
        """Whether what runs now is a pass, and nothing else that is timed within it."""
        return bool(self._open) and self._open[-1] in PASSES

    @contextmanager
    def running(self, kind: Kind) -> Iterator[None]:
        """The block is of this kind."""
        outer = self._open[-1] if self._open else None
        self._open.append(kind)
        start = _now(kind)
        try:
            yield
        finally:
            self._spans.append((kind, outer, start, _now(kind)))
            self._open.pop()

    def timed(self, kind: Kind, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose calls are of this kind."""

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.running(kind):
                return function(*args, **kwargs)

        return call

    def take(self) -> dict[Kind, float]:
        """Seconds of each kind since the last call, once the device has done all of it."""
        self._taken, self._spans = self._spans, []
        seconds = dict.fromkeys(KINDS, 0.0)
        for kind, outer, start, end in self._taken:
            elapsed = _elapsed_s(start, end)
            seconds[kind] += elapsed
            if outer is not None:
                seconds[outer] -= elapsed
        return seconds

    def spans(self) -> list[Span]:
        """What ``take`` took last, in the order in which it ended."""
        on_host, on_device = self._began
        found = []
        for kind, _, start, end in self._taken:
            began = on_host if isinstance(start, float) else on_device
            found.append(Span(kind, _elapsed_s(began, start), _elapsed_s(began, end)))
        return found


class StoppedClock(StepClock):
    """Times nothing, and keeps nothing."""

    @contextmanager
    def running(self, kind: Kind) -> Iterator[None]:
        yield


def _now(kind: Kind) -> _Mark:
    if kind == "data" or not current_device().is_cuda:  # data are a matter of the host: the device has nothing to do
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_s(start: _Mark, end: _Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000
