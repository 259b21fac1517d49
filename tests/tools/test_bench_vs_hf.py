"""The benchmark against transformers runs, on a model too small to time, and both sides begin with the same loss."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests import warm

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_vs_hf.py"
SMALL = "--num-layers 4 --hidden-size 64 --vocab-size 1024 --sequence-length 256 --num-pairs 2 --json"


def test_bench_compares_the_same_model() -> None:
    run = warm.run([sys.executable, str(TOOL), *SMALL.split()], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert 0 < found["flops_ratio_sts"] < 1 and found["ratio_dense"] > 0 and found["ratio_sts"] > 0
    assert len(found["pairs"]) == 2
    # fp32 sums in another order: measured 1e-7.
    assert found["first_loss_difference"] < 5e-7
