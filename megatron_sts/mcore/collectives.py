"""Times the collectives within passes: those of tensor- and context-parallel ranks. What waits outside passes is not theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core.tensor_parallel import layers, mappings

from megatron_sts.mcore.groups import context_parallel_group, row_group, tensor_parallel_group
from megatron_sts.mcore.replaced import replaced
from megatron_sts.runtime.clock import Kind, StepClock

_CALLED: tuple[tuple[Any, str], ...] = (
    (dist, "all_reduce"),
    (dist, "all_gather"),
    (dist, "all_gather_into_tensor"),
    (dist, "reduce_scatter_tensor"),
    *((module, name) for module in (layers, mappings) for name in ("dist_all_gather_func", "dist_reduce_scatter_func")),
)
"""By these names megatron-core's layers, Transformer Engine's and ours call collectives; not so user buffers, which no product waits for."""


class TimedWork:
    """A transfer under way, of which nothing is asked but to be waited for."""

    def __init__(self, work: dist.Work, kind: Kind, clock: StepClock) -> None:
        self._work, self._kind, self._clock = work, kind, clock

    def wait(self) -> None:
        """Until it is done."""
        with self._clock.running(self._kind):
            self._work.wait()


@contextmanager
def timing_collectives(clock: StepClock) -> Iterator[None]:
    """Times those that are called while the block runs."""
    of_layers = tensor_parallel_group(), context_parallel_group(), row_group()
    groups = [group for group in of_layers if group.size() > 1]
    with ExitStack() as stack:
        for owner, name in _CALLED if groups else ():
            stack.enter_context(replaced(owner, name, _timed(getattr(owner, name), groups, clock)))
        yield


def _timed(plain: Callable[..., Any], groups: Sequence[dist.ProcessGroup], clock: StepClock) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("group") not in groups or not clock.is_in_pass:
            return plain(*args, **kwargs)
        with clock.running("layer_communication"):
            work = plain(*args, **kwargs)
        return None if work is None else TimedWork(work, "layer_communication", clock)

    return call
