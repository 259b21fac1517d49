"""The study of what rounds cost: runs of a few steps, whose table says what they wrote."""

from __future__ import annotations

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest

from megatron_sts.report.run import read_run
from tests import warm

TOOL = Path(__file__).resolve().parents[2] / "tools" / "skipping_quality.py"
CASES = ("bernoulli", "rounds of 4 layers, no yields")
TINY = [
    "model.vision.init=null", "model.language.init=null", "model.vision.num_layers=1", "stages.0.steps=3",
    "stages.0.optimizer.warmup_steps=1", "stages.0.batch.global_batch_size=2", "stages.0.batch.micro_batch_size=2",
    "evaluation.num_questions=12",
]  # fmt: skip


def test_the_table_says_what_the_runs_wrote(tmp_path: Path) -> None:
    words = [*TINY, "--out", str(tmp_path), "--seeds", "5", "--cases", *CASES]
    run = warm.run([sys.executable, str(TOOL), *words], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert [line.split(": ")[0] for line in run.stdout.splitlines()] == list(CASES)
    rows = list(csv.DictReader((tmp_path / "quality.csv").open()))
    assert [(row["case"], row["family"]) for row in rows] == [
        (case, family) for case in CASES for family in ("existence", "relation", "counting", "ocr", "choice")
    ]
    for case, name in zip(CASES, ("bernoulli-5", "rounds_of_4_layers-no_yields-5"), strict=True):
        done = read_run(tmp_path / name)
        [stage] = done.config["stages"]
        lds = stage["lds"]
        assert stage["vtc"] is None and (lds["alpha"], lds["epsilon"], lds["depth_profile"]) == (0.5, 0.5, "linear")
        expected = ("bernoulli", "layout", "auto") if case == "bernoulli" else ("rounds", 3, "off")
        assert (lds["sampler"], lds["rounds"], lds["head_yields"]) == expected and done.config["seed"] == 5
        found = json.loads((tmp_path / name / "evaluation.json").read_text())["splits"]["eval"]
        losses = [line["loss"] for line in done.steps["finetune"]]
        for row in (row for row in rows if row["case"] == case):
            accuracy = found[row["family"]]["accuracy"]
            assert float(row["accuracy"]) == pytest.approx(accuracy, abs=5e-5)
            assert 0 <= float(row["low"]) <= accuracy <= float(row["high"]) <= 1
            assert float(row["first_losses"]) == pytest.approx(sum(losses) / 3, abs=5e-5)


def test_wilson_interval() -> None:
    wilson = runpy.run_path(str(TOOL))["wilson"]
    # Newcombe (1998), table I: 81 of 263 without continuity correction, 0.2553 to 0.3662.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
