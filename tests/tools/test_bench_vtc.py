"""The VTC benchmark runs, on a model too small to time, and its predictions follow the kept tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import warm

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_vtc.py"
SMALL = ["--num-layers", "2", "--hidden-size", "64", "--num-pairs", "1", "--json"]


def test_fine_tuning_on_tiles_does_a_third_of_the_work_at_a_quarter_of_the_tokens() -> None:
    """Target: at most 0.45 of the dense step, of which this is what FLOPs leave; seconds are for a quiet machine."""
    command = [sys.executable, str(TOOL), "--tiles", *SMALL]
    run = warm.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    cases = {case["keep_ratio"]: case for case in json.loads(run.stdout)["cases"]}
    assert 1 - cases[0.25]["ideal_saving"] <= 0.45 * 0.9


def test_bench_reports_every_keep_ratio() -> None:
    run = warm.run([sys.executable, str(TOOL), *SMALL], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    cases = {case["keep_ratio"]: case for case in json.loads(run.stdout)["cases"]}
    assert list(cases) == [1.0, 0.75, 0.5, 0.25, 0.1]
    ideal = [case["ideal_saving"] for case in cases.values()]
    saved = [case["saved_bytes_saving"] for case in cases.values()]
    assert ideal[0] == saved[0] == 0 and ideal == sorted(ideal) and saved == sorted(saved)
    # Linear in the tokens but for the tower, which is small, and attention, whose scores torch's kernel does not keep.
    assert saved[2] / saved[4] == pytest.approx((1 - 0.5) / (1 - 14 / 144), rel=0.05)
