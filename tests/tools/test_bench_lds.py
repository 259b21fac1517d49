"""The LDS benchmark runs, on a model too small to time, and counts the FLOPs of the masks that it ran."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import warm

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_lds.py"
SMALL = [
    "--num-layers",
    "4",
    "--hidden-size",
    "64",
    "--sequence-length",
    "152",
    "--num-microbatches",
    "2",
    "--num-masks",
    "1",
    "--num-schedule-masks",
    "2",
    "--json",
]


def test_bench_reports_every_case() -> None:
    run = warm.run([sys.executable, str(TOOL), *SMALL], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    cases = {(case["layout"], case["sampler"], case["skip_fraction"]): case for case in found["cases"]}
    assert {layout for layout, _, _ in cases} == {"one rank", "PP2"} and len(cases) == 2 * 2 * 5
    for layout in ("one rank", "PP2"):
        ideal = {fraction: cases[layout, "balanced", fraction]["ideal_saving"] for fraction in (0.0, 0.25, 0.5, 0.75)}
        assert ideal[0.0] == 0 and cases[layout, "balanced", 0.0]["efficiency"] is None
        assert ideal[0.5] > 0
        if layout == "one rank":  # four layers on one rank: exactly one, two and three are skipped
            assert ideal[0.5] == pytest.approx(2 * ideal[0.25]) and ideal[0.75] == pytest.approx(3 * ideal[0.25])
        for case in cases.values():
            if case["ideal_saving"]:
                assert case["efficiency"] == pytest.approx(case["realised_saving"] / case["ideal_saving"])
    assert set(found["overlap_over_plain"]) == {"dense", "half_skipped"} and "skipped_layer_overhead" in found
