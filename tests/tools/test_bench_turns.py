"""Two runs that take turns are the runs that they are alone; steps in which one was stopped do not count."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from megatron_sts.config.errors import ConfigError
from megatron_sts.report.run import Run
from tests import warm
from tests.train import stagehand
from tools.bench_turns import timed

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_turns.py"


def run_of(*steps_s: float) -> Run:
    lines = [{"step": step, "step_time_s": each, "flops_executed": 3.0} for step, each in enumerate(steps_s)]
    return Run(Path("a"), {}, {"finetune": lines}, None, {}, {}, {})


def test_steps_in_which_a_run_was_stopped_do_not_count() -> None:
    [found] = timed(run_of(0.1, 0.3, 5.6, 0.2, 0.2), 5)
    assert (found.num_steps, found.num_stopped, found.flops_executed) == (5, 1, 15)
    assert found.step_s == pytest.approx(0.2) and found.seconds == pytest.approx(1)


def test_turns_that_are_too_short_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"--turn-s=0\.7: steps of finetune of a took 0\.2 s; give 4 times as much"):
        list(timed(run_of(0.2, 0.2, 0.9), 0.7))


def sweep_of(folder: Path) -> Path:
    """Runs of a second or two on two ranks each."""
    parallel = {**stagehand.LAYOUTS["DP=2"], "timeout_s": 100}
    steps = ["stages.*.steps=40", "checkpoint.interval_steps=null"]
    (folder / "bad.json").write_text(json.dumps([{"id": "0", "conversations": []}] * 8))
    (folder / "config.yaml").write_text(yaml.safe_dump(stagehand.config(parallel=parallel)))
    cases = {"dense": ["stages.*.vtc=null", "stages.*.lds=null"], "sparse": [], "broken": ["stages.*.data.source=llava_json", f"stages.*.data.path={folder}/bad.json"]}  # fmt: skip
    (folder / "pairs.yaml").write_text(
        yaml.safe_dump({"config": "config.yaml", "overrides": steps, "cases": cases}, sort_keys=False)
    )
    return folder / "pairs.yaml"


def test_two_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(TOOL), str(sweep_of(tmp_path)), "dense", "sparse", "--turn-s", "1", "--out", str(out), "--json"]  # fmt: skip
    run = warm.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert [[(each["run"], each["stage"], each["num_steps"]) for each in stages] for stages in found] == [
        [(name, stage, 40) for stage in ("alignment", "finetune")] for name in ("dense", "sparse")
    ]
    assert all(sum(each["num_stopped"] for each in stages) > 0 for stages in found)
    dense, sparse = found
    assert all(a["flops_executed"] > b["flops_executed"] for a, b in zip(dense, sparse, strict=True))
    alone = tmp_path / "alone"
    told = warm.run([sys.executable, "-m", "megatron_sts", "train", str(tmp_path / "config.yaml"), "stages.*.steps=40", "--run-dir", str(alone)], timeout=240)  # fmt: skip
    assert told.returncode == 0
    losses = [[(line["stage"], line["step"], line["loss"]) for line in stagehand.lines(folder) if "loss" in line] for folder in (alone, out / "sparse")]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (["dense", "spars"], "RUN=spars: .* has no such run; give two of dense, sparse, broken"),
        (["dense", "broken"], "broken failed with status [1-9]: .*[a-z]"),
    ],
)
def test_what_cannot_be_timed_is_told(tmp_path: Path, runs: list[str], said: str) -> None:
    command = [sys.executable, str(TOOL), str(sweep_of(tmp_path)), *runs, "--turn-s", "1"]
    run = warm.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 2
    assert re.search(said, " ".join(run.stderr.split()))
