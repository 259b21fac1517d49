"""The benchmark of what samplers keep runs on a few pictures, and its numbers are those of the samplers' definitions."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import warm

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_ocr.py"


def test_bench_reports_every_case() -> None:
    pytest.importorskip("sklearn", reason="the tool's photographs come with scikit-learn")
    command = [sys.executable, str(TOOL), "--num-images", "3", "--json"]
    run = warm.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    metrics = {"scenes": {"recall of digits", "recall of sprites", "gap"}}
    metrics |= {kind: {"recall of text", "gap"} for kind in ("photo", "noise", "emoji")}
    means = {}
    for case in found["cases"]:
        means[case["pictures"], case["sampler"], case["keep_ratio"], case["metric"]] = case["mean"]
        assert case["metric"] in metrics[case["pictures"]] and case["standard_error"] >= 0
        assert "recall" not in case["metric"] or 0 <= case["mean"] <= 1
    samplers = {sampler for _, sampler, _, _ in means}
    assert len(samplers) == 2 + 7 + 4 + 1
    assert len(means) == len(samplers) * 3 * sum(map(len, metrics.values()))
    for kind in metrics:
        # Half of an even grid is a checkerboard: each dropped patch has a kept neighbour at distance 1.
        assert means[kind, "uniform", 0.5, "gap"] == pytest.approx(0.5)
