"""The LDS benchmark runs, on a model too small to time, and counts the FLOPs of the masks that it ran."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

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
    "--cases",
    "one rank",
    "PP2",
    "DP2",
    "--num-masks",
    "1",
    "--num-passes",
    "1",
    "--num-schedule-masks",
    "2",
    "--microbatches",
    "2",
    "--json",
]


def bench(*cases: str) -> dict[str, Any]:
    command = [sys.executable, str(TOOL), *SMALL, "--cases", *cases]
    run = warm.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout)
    return found


def test_bench_of_an_interleaved_layout() -> None:
    found = bench("VPP3")
    assert found.keys() == {"device", "cases"}
    cases = {(case["sampler"], case["skip_fraction"]): case for case in found["cases"]}
    assert {sampler for sampler, _ in cases} == {"rounds", "quota", "bernoulli"}
    # Three rounds of four layers: a third and two thirds are exactly one and two of them, a half is either.
    third, half, both = (cases["rounds", share]["ideal_saving"] for share in (1 / 3, 1 / 2, 2 / 3))
    assert both == pytest.approx(2 * third) and half in (pytest.approx(third), pytest.approx(both))
    for case in cases.values():
        assert case["num_microbatches"] == 2 and case["bound"] == pytest.approx(2 * 3 / (2 * 3 + 1))
        assert case["dense_over_contiguous"] > 0 and 0 < case["dropping_cost"] < 1


def test_bench_reports_every_case() -> None:
    found = bench("one rank", "PP2", "DP2")
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
