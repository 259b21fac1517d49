"""The data benchmark runs, on too few pictures and steps to time, and reports every number of workers and stage."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests import warm

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_data.py"


@pytest.mark.slow
def test_bench_reports_each_number_of_workers() -> None:
    words = ["--json", "--num-images", "40", "--image-size", "32", "--num-steps", "2"]
    run = warm.run([sys.executable, str(TOOL), *words], capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout)
    assert set(found["images_per_s_by_num_workers"]) == {"0", "1", "2"}
    assert all(rate > 0 for rate in found["images_per_s_by_num_workers"].values())
    waited = found["data_wait_of_step_time"]
    assert {example: set(stages) for example, stages in waited.items()} == {
        "quickstart": {"alignment", "finetune"},
        "llava_json": {"alignment", "finetune"},
    }
    assert all(0 <= share < 1 for stages in waited.values() for share in stages.values())
    # JPEGs of 336 x 252 pixels: 4 KiB would be plain colour, 250 KiB no compression at all.
    assert 4 * 2**10 < found["bytes_per_image"] < 250 * 2**10
