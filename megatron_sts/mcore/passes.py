"""How long this rank's device is at work on forward and backward passes: what is left of a step are waits and the update."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules

from megatron_sts.runtime.device import current_device


class PassClock:
    """Adds up passes. On a GPU by events of its stream, which then begin when what was received for them is there.

    What waits for other ranks within a pass counts as part of it: tensor-parallel collectives, and overlapped gathers of weights.
    """

    def __init__(self) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """A pass lasts as long as the block."""
        if current_device().is_cuda:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
            yield
            events[1].record()
            self._events.append(events)
            return
        started = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - started

    @contextmanager
    def timing_backward(self) -> Iterator[None]:
        """Times the backward passes that megatron-core's schedules run while the block runs."""
        plain = schedules.backward_step

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.running():
                return plain(*args, **kwargs)

        schedules.backward_step = timed
        try:
            yield
        finally:
            schedules.backward_step = plain

    def take(self) -> float:
        """Seconds since the last call, once the device has done all of it."""
        if self._events:
            self._events[-1][1].synchronize()
        seconds = self._seconds + sum(start.elapsed_time(end) for start, end in self._events) / 1000
        self._events, self._seconds = [], 0.0
        return seconds


class PassesInFlight:
    """Within it, counts the forward passes of the schedule's units that wait for their backward passes: ``most`` at once."""

    def __init__(self) -> None:
        self._now = self.most = 0

    def __enter__(self) -> PassesInFlight:
        self._plain = schedules.forward_step, schedules.backward_step
        forward, backward = self._plain

        def one_more(*args: Any, **kwargs: Any) -> Any:
            self._now += 1
            self.most = max(self.most, self._now)
            return forward(*args, **kwargs)

        def one_less(*args: Any, **kwargs: Any) -> Any:
            self._now -= 1
            return backward(*args, **kwargs)

        schedules.forward_step, schedules.backward_step = one_more, one_less
        return self

    def __exit__(self, *_error: object) -> None:
        schedules.forward_step, schedules.backward_step = self._plain
