"""``megatron-sts plan`` in seconds: what it prints, as JSON and for people, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from megatron_sts.cli import main
from megatron_sts.commands.seconds import duration
from megatron_sts.commands.ways import print_search

ROOT = Path(__file__).parents[2]
EXAMPLE = str(ROOT / "examples" / "llava15_7b")
SHORT = ["stages.*.epochs=null", "stages.*.steps=200"]


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["plan", EXAMPLE, *SHORT, *words, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_seconds_of_a_run(capsys: pytest.CaptureFixture[str]) -> None:
    time = planned(capsys)["time"]
    for stage in (*time["stages"].values(), *(stage["dense"] for stage in time["stages"].values())):
        low, high = stage["step_time_s_range"]
        assert low < stage["step_time_s"] < high and 0 < stage["mfu"] < 1
        parts = sum(stage["split_s"].values())
        assert parts == pytest.approx(stage["step_time_s"])
        assert stage["hours"] == pytest.approx(200 * stage["step_time_s"] / 3600)
    assert time["gpu_hours"] == pytest.approx(time["hours"] * time["num_gpus"])
    assert time["speedup"] == pytest.approx(time["dense_hours"] / time["hours"]) and time["speedup"] > 1


def test_hardware_and_assumptions_count(capsys: pytest.CaptureFixture[str]) -> None:
    hours = [
        planned(capsys, *words)["time"]["hours"]
        for words in (["--hardware", "h100", "--assume", "fused_elementwise=true"], ["--hardware", "h100"], ["--hardware", "a100"])
    ]  # fmt: skip
    assert hours[0] < hours[1] < hours[2]


def test_a_format_without_rates_has_no_seconds_unless_they_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, "precision.fp8=emulate")["time"] is None
    assert main(["plan", EXAMPLE, *SHORT, "precision.params=fp32"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.endswith("No seconds and no head-room: precision.params=fp32: no rates of fp32 are known.")


def test_what_leaving_fp8_saves(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside the run in FP8 everywhere, which ``all`` is; also for people, and in what a dry start shows."""
    fp8 = ["precision.fp8=tensorwise", "parallel.tensor_model_parallel_size=8"]
    auto, everywhere = (planned(capsys, *fp8, f"precision.fp8_where={where}")["time"] for where in ("auto", "all"))
    assert auto["fp8_where"]["decided_on"] == "h100" and everywhere["fp8_where"] is None
    found = auto["fp8_where"]["stages"]
    assert any(stage["bf16_products"] for stage in found.values())
    for name, stage in found.items():
        saved_s = everywhere["stages"][name]["step_time_s"] - auto["stages"][name]["step_time_s"]
        assert stage["saved_s"] == pytest.approx(saved_s) and (saved_s > 0) is bool(stage["bf16_products"])
    words = [EXAMPLE, *SHORT, *fp8, "precision.fp8_where=auto"]
    assert main(["plan", *words]) == 0
    assert "s of a step saved, beside FP8 everywhere" in capsys.readouterr().out
    assert main(["train", *words, "--dry-run", "--json"]) in (0, 2)  # this machine may lack what it needs
    shown = {stage["name"]: stage["bf16_products"] for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert shown == {name: stage["bf16_products"] for name, stage in found.items()}


@pytest.mark.parametrize("command", ["plan", "dryrun"])
def test_text_only_as_the_readme_has_it(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which dryrun sets for itself: put back afterwards
    text = (ROOT / "megatron_sts/plan/README.md").read_text()
    [line] = re.findall(rf"^megatron-sts ({command} .*model.vision=null.*)$", text, re.M)
    assert main([*shlex.split(line), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    if command == "plan":
        assert {stage["images_per_s"] for stage in found["time"]["stages"].values()} == {0}
        weights = [ranks["memory_per_rank"][0]["weights_bytes"] for ranks in found["memory"]["stages"].values()]
    else:
        [rank] = found["ranks"]
        assert not any(name.startswith(("vision", "projector")) for name in rank["work"])
        weights = [rank["memory"]["weights_bytes"]]
    # Llama-3.1-8B's 8.03 G parameters in bf16, by four ranks (norms on each).
    assert weights == pytest.approx([8.03e9 * 2 / 4] * len(weights), rel=1e-3)


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", EXAMPLE, *SHORT, "--hardware", "h200"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "H200" in said and "times as fast as dense" in said and "MFU" in said
    assert (
        "by LDS, over the best layout without it (VTC, if any, in both)" in said
        and "dense (without LDS and VTC)" in said
    )


def test_a_short_run_is_told_in_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    time = planned(capsys)["time"]
    assert main(["plan", EXAMPLE, *SHORT]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert time["hours"] < 1 and f"The run: {60 * time['hours']:.1f} min ±" in said
    assert main(["plan", EXAMPLE]) == 0
    assert re.search(r"The run: [1-9]\d*\.\d\d h ±", " ".join(capsys.readouterr().out.split()))


def test_what_vtc_saves_counts_in_hours_and_not_for_lds(capsys: pytest.CaptureFixture[str]) -> None:
    """The two baselines that are told apart: the run without LDS, and without both."""
    facts, without = planned(capsys), planned(capsys, "stages.*.vtc=null")
    assert facts["lds"]["stage_flops_speedup"] == pytest.approx(without["lds"]["stage_flops_speedup"])
    assert facts["time"]["dense_hours"] == pytest.approx(without["time"]["dense_hours"])
    assert facts["time"]["speedup"] > without["time"]["speedup"]


def test_search(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--search", "model.language.num_layers=4")["search"]
    print_search(found, 1.0, Console(width=200))
    said = capsys.readouterr().out
    assert "The fastest ways that fit" in said
    best = found["found"][0]
    cells = [[cell.strip() for cell in line.strip("┃│ ").replace("┃", "│").split("│")] for line in said.splitlines()]
    [heads] = [row for row in cells if row[0] == "training"]
    row = next(row for row in cells if row[0] == duration(best["hours"]))
    shown = dict(zip(heads, row, strict=True))
    keys = {"TP": "tensor", "CP": "context", "PP": "pipeline", "chunks": "chunks", "DP": "data"}
    assert {name: shown[name] for name in keys} == {name: str(best[key]) for name, key in keys.items()}
    assert said.strip().splitlines()[-1].split() == found["found"][0]["overrides"]
    print_search({**found, "found": []}, 1.0, Console())
    assert "nothing fits 79 GiB" in capsys.readouterr().out


def test_a_trace_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On two pipeline ranks: as many slices as passes, in time order on each rank, within what the plan says of the step."""
    trace, picture = tmp_path / "trace.json", tmp_path / "step.png"
    words = [
        "parallel.pipeline_model_parallel_size=2",
        "parallel.use_distributed_optimizer=false",
        "parallel.data_parallel_size=4",
    ]
    facts = planned(capsys, *words, "stages.*.lds=null", "--trace", str(trace), "--timeline", str(picture))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    for number, stage in enumerate(facts["time"]["stages"].values()):
        passes = [event for event in events if event["pid"] == number and event["cat"] in ("forward", "backward")]
        assert len([event for event in passes if event["tid"] == 0 and event["cat"] == "forward"]) * 4 == len(passes)
        ends = max(event["ts"] + event["dur"] for event in passes)
        assert ends <= stage["dense"]["split_s"]["pipeline"] * 1e6 * (1 + 1e-9)
        assert any(event["cat"] == "optimizer" for event in events if event["pid"] == number)
    assert picture.read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hardware", "h1000"], "use a100, h100, h200 or a path"),
        (["--assume", "speed=fast"], "KEY is one of"),
        (
            ["--assume", "gradient_bytes=3"],
            "error: --assume gradient_bytes=3: it should be 2 or 4; megatron_sts/plan/README.md",
        ),
        (["--assume", "fused_attention=maybe"], "error: --assume fused_attention=maybe: it should be true or false; "),
        (["--hardware", "h100", "precision.params=fp32"], "no rates of fp32"),
        (["--search", "precision.params=fp32"], "no rates of fp32"),
        (["--hardware", "a100", "precision.fp8=tensorwise"], "A100 SXM, NVLink, 200 Gb/s InfiniBand has no FP8"),
        (["--hardware", "h100", "precision.fp8=mxfp8"], "cannot scale so; use one of tensorwise, delayed, blockwise"),
        (["--trace", "step.json", "precision.fp8=emulate"], "emulation takes is not modelled"),
        (["--trace", "/nowhere/trace.json"], "--trace=/nowhere/trace.json"),
    ],
)
def test_refusals_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", EXAMPLE, *SHORT, *words]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said
