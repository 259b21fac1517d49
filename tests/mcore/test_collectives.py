"""Collectives of tensor- and context-parallel ranks are timed within passes, and calls are as before afterwards."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch.distributed as dist

from megatron_sts.mcore import collectives
from megatron_sts.mcore.collectives import timing_collectives
from megatron_sts.runtime.clock import StepClock


def test_those_outside_passes_are_not_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the sum of norms' gradients over tensor-parallel ranks, when passes are over."""
    ours, other = SimpleNamespace(size=lambda: 2), SimpleNamespace(size=lambda: 2)
    for name in ("tensor_parallel_group", "context_parallel_group", "row_group"):
        monkeypatch.setattr(collectives, name, lambda: ours)
    waited: list[str] = []
    work = SimpleNamespace(wait=lambda: waited.append("waited"))
    monkeypatch.setattr(dist, "all_reduce", plain := lambda *_, **options: work if options.get("async_op") else None)
    clock = StepClock()
    with pytest.raises(RuntimeError, match="a schedule that fails"), timing_collectives(clock):
        with clock.running("forward"):
            assert dist.all_reduce(None, group=ours) is None
            assert dist.all_reduce(None, group=other, async_op=True) is work
        with clock.running("backward"):
            dist.all_reduce(None, group=ours, async_op=True).wait()
        with clock.running("communication"):
            assert dist.all_reduce(None, group=ours, async_op=True) is work
        raise RuntimeError("a schedule that fails")
    assert dist.all_reduce is plain and waited == ["waited"]
    clock.take()
    within = "layer_communication"
    assert [span.kind for span in clock.spans()] == [within, "forward", within, within, "backward", "communication"]
