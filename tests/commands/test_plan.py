"""``megatron-sts plan`` in seconds: what it prints, as JSON and for people, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sts.cli import main

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


def test_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", EXAMPLE, *SHORT, "--hardware", "h200"]) == 0
    said = capsys.readouterr().out
    assert "H200" in said and "times as fast as dense" in said and "MFU" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hardware", "h1000"], "use a100, h100, h200 or a path"),
        (["--assume", "speed=fast"], "KEY is one of"),
        (["--assume", "gradient_bytes=3"], "gradient_bytes"),
        (["--hardware", "h100", "precision.params=fp32"], "no rates of fp32"),
    ],
)
def test_refusals_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", EXAMPLE, *SHORT, *words]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and "\n" not in said
