"""The benchmark's numbers are those of the steps that it counts, its runs are short and of the right sizes; and timers take next to nothing."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sts.config.load import dump
from megatron_sts.config.resolve import resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.report.fields import PARTS, RATES
from tests import warm
from tests.train import stagehand
from tools import bench_throughput

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def told(tool: str, *words: str) -> Any:
    run = warm.run([sys.executable, str(TOOLS / tool), *words, "--json"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_run_on_local_ranks(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(stagehand.config(parallel=stagehand.LAYOUTS["DP=2"])))
    out = tmp_path / "run"
    found = told("bench_throughput.py", "run", str(config), "seed=3", "--nproc", "2", "--steps", "8", "--out", str(out))
    assert found["machine"]["device"] == "cpu" and found["machine"]["torch"]
    steps = [line for line in stagehand.lines(out) if "loss" in line]
    assert [stage["stage"] for stage in found["stages"]] == ["alignment", "finetune"]
    for stage in found["stages"]:
        lines = sorted(line["step_time_s"] for line in steps if line["stage"] == stage["stage"] and line["step"] >= 5)
        assert stage["num_steps"] == len(lines) == 3 and stage["num_ranks"] == 2 and stage["global_batch_size"] == 8
        assert stage["step_time_s"]["median"] == lines[1]
        assert lines[0] <= stage["step_time_s"]["lower"] <= stage["step_time_s"]["upper"] <= lines[2]
        assert stage["rates"].keys() == set(RATES) - {"mfu", "dense_mfu"} and stage["parts_s"].keys() == set(PARTS)
        assert stage["efficiency"] == 1 and stage["slowest_rank"] in (0, 1)


@pytest.mark.parametrize("words", [["--steps", "6"], ["stages.finetune.steps=6"]])
def test_too_few_steps_are_refused_before_they_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(stagehand.config()))
    for command in (["run"], ["submit", "--nodes", "1", "--scaling", "weak"]):
        monkeypatch.setattr(sys, "argv", ["bench", *command[:1], str(config), *words, *command[1:]])
        with pytest.raises(SystemExit) as stop:
            bench_throughput.main()
        assert stop.value.code == 2
        assert "steps=6: the first 5 do not count; --steps 7 at least" in capsys.readouterr().err


def test_a_run_leaves_nothing_where_no_folder_was_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither if it fails: here because more ranks are asked for than the config has."""
    config, scratch = tmp_path / "config.yaml", tmp_path / "scratch"
    config.write_text(yaml.safe_dump(stagehand.config(parallel={"data_parallel_size": 1})))
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(sys, "argv", ["bench", "run", str(config), "--nproc", "3"])
    with pytest.raises(SystemExit) as stop:
        bench_throughput.main()
    assert stop.value.code == 2 and not list(scratch.iterdir())


def test_timers(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(stagehand.config()))
    timers = told("bench_timers.py", str(config), "--steps", "5")
    assert timers["ranks"] == 1
    for stage in timers["stages"].values():
        # 4 micro-batches, a pass each way; data, totals, gradients twice and the update. 20 microseconds are much for a span.
        assert stage["num_spans"] >= 2 * 4 + 5
        assert stage["timers_share"] * stage["step_s"] / stage["num_spans"] < 20e-6


def run_of(folder: Path, num_ranks: int, tokens_per_s: float) -> Path:
    """A finished run of one stage, whose first steps are slow."""
    written = stagehand.config(parallel={"data_parallel_size": num_ranks})
    written["stages"] = [{**written["stages"][1], "batch": {**written["stages"][1]["batch"], "global_batch_size": 16}}]
    folder.mkdir()
    dump(resolve(RunConfig.model_validate(written), world_size=num_ranks), folder / "config.resolved.yaml")
    common = {"stage": "finetune", **dict.fromkeys(PARTS, 0.1), **dict.fromkeys(RATES), "images_per_s": 1.0}
    common |= {"tflops_per_device": 1.0, "step_time_s": 0.7}
    slow, fast = ({"tokens_per_s": rate, "tokens_per_s_per_device": rate / num_ranks} for rate in (1.0, tokens_per_s))
    lines = [{**common, **(slow if step < 5 else fast), "step": step} for step in range(9)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_efficiency_is_beside_the_smallest_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [run_of(tmp_path / str(ranks), ranks, rate) for ranks, rate in ((4, 300.0), (1, 100.0), (2, 180.0))]
    monkeypatch.setattr(sys, "argv", ["bench", "read", *map(str, folders), "--json"])
    bench_throughput.main()
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert [(each["num_ranks"], each["efficiency"]) for each in stages] == [(1, 1.0), (2, 0.9), (4, 0.75)]
    monkeypatch.setattr(sys, "argv", ["bench", "read", *map(str, folders)])
    bench_throughput.main()
    assert "0.75" in capsys.readouterr().out
