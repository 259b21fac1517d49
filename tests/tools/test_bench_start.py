"""The benchmark of starts measures each kind of start once, and what it finds is possible."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_start.py"


@pytest.mark.slow
def test_bench_measures_each_start() -> None:
    done = subprocess.run(
        [sys.executable, str(TOOL), "--json", "--rounds", "1"], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    [kinds] = json.loads(done.stdout).values()
    cpu = {name: start["cpu_s"] for name, start in kinds.items()}
    assert cpu["python"] < cpu["import torch"] < cpu["import megatron.core"]
    # Neither imports torch. Generous: processor seconds of a busy machine.
    assert cpu["--help"] < cpu["train --dry-run"] < cpu["import torch"]
    # Two ranks that each imported megatron.core would cost more than twice as much as one import.
    assert cpu["first step"] < 2 * cpu["import megatron.core"]
    assert 2**28 < kinds["first step"]["peak_rank_bytes"] < 2**32
    assert kinds["first step"]["together_bytes"] < 2 * kinds["first step"]["peak_rank_bytes"]
