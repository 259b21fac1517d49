"""The FP8 curves: four runs of a few steps, one figure, and gaps that are those of the losses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_sts.report.run import read_run
from tests import warm

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fp8_curves.py"
TINY = [
    "model.vision.init=null", "model.language.init=null", "model.vision.num_layers=1", "model.language.num_layers=8",
    "stages.*.steps=4", "stages.*.optimizer.warmup_steps=1", "stages.*.batch.global_batch_size=2",
    "stages.*.batch.micro_batch_size=2",
]  # fmt: skip


@pytest.mark.slow
def test_four_runs_and_their_gaps(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--out", str(tmp_path), "--seeds", "3", "--json", *TINY]
    run = warm.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    facts = json.loads(run.stdout)
    assert json.loads((tmp_path / "fp8_curves.json").read_text()) == facts
    assert (tmp_path / "fp8_curves.png").read_bytes().startswith(b"\x89PNG")
    for kind in ("dense", "STS"):
        for stage, found in facts["gaps"][kind].items():
            plain, fp8 = (
                np.array([line["loss"] for line in read_run(tmp_path / f"3-{kind.lower()}-{name}").steps[stage]])
                for name in ("plain", "tensorwise")
            )
            assert len(plain) == 4 and not np.array_equal(plain, fp8)
            assert found["gap"] == pytest.approx(fp8[-1] / plain[-1] - 1) and found["of_seeds"] == [found["gap"]]
