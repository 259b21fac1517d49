"""The benchmark of the encoder runs, on a model too small to time, and counts what ranks execute."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import warm

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_encoder.py"
SMALL = ["--num-layers=4", "--hidden-size=64", "--tower-hidden-size=64", "--num-microbatches=2", "--rounds=1"]


def test_bench() -> None:
    command = [sys.executable, str(TOOL), *SMALL, "--counted", "2", "--json"]
    run = warm.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert found.keys() == {"device", "counted", "timed"}
    [two] = found["counted"]
    # Of a step of 1 a tower of 2/3 on one rank and the rest on the other, against 1/2 on each.
    assert two["tower_share"] == pytest.approx(2 / 3, abs=0.02) and two["best_layout"] == [0, 4]
    assert 0.72 < two["spread_over_best"] < 0.85  # so small a decoder has a large head, on the second rank
    assert two["images_a_rank"] == [33, 34] and two["tower_largest_over_mean"] == pytest.approx(34 / 33.5)
    assert found["timed"]["spread_over_first"].keys() == {"first, [0, 4]", "first, [1, 3]", "first, [2, 2]"}
    assert 0 < found["timed"]["tower_share_of_time"] < 1
