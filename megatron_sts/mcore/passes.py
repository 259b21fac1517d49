"""What megatron-core's pipeline schedules do, timed: backward passes, waits for other stages, gradients that ranks share; and counted."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

from megatron_sts.mcore.collectives import TimedWork, timing_collectives
from megatron_sts.mcore.replaced import replaced
from megatron_sts.runtime.clock import Kind, StepClock

_FINALIZING = sys.modules[finalize_model_grads.__module__]
"""Its package gives the function under the module's name."""
_TIMED: tuple[tuple[Any, str, Kind], ...] = (
    (schedules, "backward_step", "backward"),
    (_FINALIZING, "_allreduce_word_embedding_grads", "communication"),
    (_FINALIZING, "_allreduce_non_tensor_model_parallel_grads", "communication"),
)


@contextmanager
def timing_schedule(clock: StepClock) -> Iterator[None]:
    """Times the schedule that runs while the block runs; forward passes are timed by their caller."""
    with ExitStack() as stack:
        stack.enter_context(timing_collectives(clock))
        for owner, name, kind in _TIMED:
            stack.enter_context(replaced(owner, name, clock.timed(kind, getattr(owner, name))))
        stack.enter_context(replaced(P2PCommunicator, "_communicate", _timed_transfer(clock)))
        yield


def _timed_transfer(clock: StepClock) -> Any:
    """``P2PCommunicator._communicate``, which waits itself or, overlapped, leaves requests by what they send or receive."""
    plain = P2PCommunicator._communicate

    def communicate(self: P2PCommunicator, **kwargs: Any) -> Any:
        with clock.running("pipeline_wait"):
            from_previous, from_next, requests = plain(self, **kwargs)
        if requests is not None:
            requests = {name: TimedWork(work, "pipeline_wait", clock) for name, work in requests.items()}
        return from_previous, from_next, requests

    return communicate


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
