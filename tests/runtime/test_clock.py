"""Spans add up by kind, and one within another counts for itself alone."""

from __future__ import annotations

import time

import pytest

from megatron_sts.report.fields import PARTS
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


def test_lines_have_every_kind() -> None:
    assert (*(f"{kind}_s" for kind in KINDS), "other_s") == PARTS
