"""Spans add up by kind, and one within another counts for itself alone."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import torch

from megatron_sts.report.fields import PARTS
from megatron_sts.runtime import clock as clock_module
from megatron_sts.runtime.clock import KINDS, StepClock


def now(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    """What the host's clock says, call by call."""
    monkeypatch.setattr(time, "perf_counter", iter(seconds).__next__)


def test_a_span_within_another_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StepClock()
    now(monkeypatch, 0.0, 1.0, 3.0, 4.0, 5.0, 10.0, 12.0, 13.0)
    # 0 to 10, of which 1 to 5, and of that 3 to 4
    with clock.running("optimizer"), clock.running("communication"), clock.running("communication"):
        pass
    clock.timed("data", lambda: None)()  # 12 to 13
    seconds = clock.take()
    assert {kind: spent for kind, spent in seconds.items() if spent} == {
        "optimizer": 6.0,
        "communication": 4.0,
        "data": 1.0,
    }
    assert not any(clock.take().values())


def test_a_block_that_fails_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = StepClock()
    now(monkeypatch, 0.0, 2.0, 3.0, 4.0)
    with pytest.raises(RuntimeError, match="broken"), clock.running("forward"):
        raise RuntimeError("broken")
    with clock.running("backward"):
        pass
    assert clock.take() == dict.fromkeys(KINDS, 0.0) | {"forward": 2.0, "backward": 1.0}


class DeviceEvent:
    """What a stream has done by ``now_ms`` of the device's clock."""

    now_ms = iter([100.0, 107.0, 109.0, 130.0, 140.0])

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at_ms = next(self.now_ms)

    def synchronize(self) -> None:
        """It has."""

    def elapsed_time(self, later: DeviceEvent) -> float:
        return later.at_ms - self.at_ms


def test_a_gpu_is_timed_by_its_own_clock_and_the_host_by_its(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for CUDA's events, whose use alone is looked at."""
    monkeypatch.setattr(clock_module, "current_device", lambda: SimpleNamespace(is_cuda=True))
    monkeypatch.setattr(torch.cuda, "Event", DeviceEvent)
    now(monkeypatch, 50.0, 51.0, 53.0)
    clock = StepClock()  # at 50 s and 100 ms
    with clock.running("data"):
        pass
    for kind in ("forward", "backward"):
        with clock.running(kind):
            pass
    assert clock.take() == dict.fromkeys(KINDS, 0.0) | {"data": 2.0, "forward": 0.002, "backward": 0.01}
    assert [(kind, round(start, 6), round(end, 6)) for kind, start, end in clock.spans()] == [
        ("data", 1.0, 3.0),
        ("forward", 0.007, 0.009),
        ("backward", 0.03, 0.04),
    ]


def test_lines_have_every_kind() -> None:
    assert (*(f"{kind}_s" for kind in KINDS), "other_s") == PARTS
