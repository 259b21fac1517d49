"""Two runs that take turns are the runs that they are alone; steps in which one was stopped do not count."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import yaml

from megatron_sts.config.errors import ConfigError
from megatron_sts.report.run import Run
from tests import warm
from tests.train import stagehand
from tools.bench_turns import take_turns, timed, turn_of, warnings

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench_turns.py"


def run_of(*steps_s: float) -> Run:
    lines = [{"step": step, "step_time_s": each, "flops_executed": 3.0} for step, each in enumerate(steps_s)]
    return Run(Path("a"), {}, {"finetune": lines}, None, {}, {}, {}, {})


def test_steps_in_which_a_run_was_stopped_do_not_count() -> None:
    [found] = timed(run_of(0.1, 0.3, 5.6, 0.2, 0.2), 5)
    assert (found.num_steps, found.num_stopped, found.flops_executed) == (5, 1, 15)
    assert found.step_s == pytest.approx(0.2) and found.seconds == pytest.approx(1)


def test_turns_that_are_too_short_are_refused() -> None:
    said = r"--turn-s=0.3: a step of finetune of a takes 0\.21 s, which could not be told from a stop; give 3$"
    with pytest.raises(ConfigError, match=said):
        list(timed(run_of(0.21, 0.21, 1.9), 0.3))


@pytest.mark.parametrize(("steps_s", "turn_s"), [([], 10), ([0.5] * 20, 10), ([0.5] * 20 + [1.01] * 9 + [11.0], 10.1)])
def test_turns_get_longer_where_steps_do(steps_s: list[float], turn_s: float) -> None:
    side: Any = SimpleNamespace(steps_s=lambda: steps_s)
    assert turn_of(side, 10) == pytest.approx(turn_s)


def test_a_run_that_took_no_turns_is_named() -> None:
    one, other = list(timed(run_of(0.1, 0.1, 5.6), 5)), list(timed(run_of(0.1, 0.1), 5))
    assert list(warnings([one, one], 5)) == []
    [told] = warnings([one, other], 5)
    assert told.startswith("a was stopped in no step: it took no turns; give less than --turn-s 5")


class Dummy:
    """A run that ends in its second turn, after a part of it; it notes when it is stopped."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self._left_s, self._runs_since, self.stops = name, seconds, 0.0, list[float]()
        self._stopped_at: float | None = None

    def _ran_s(self) -> float:
        return time.monotonic() - self._runs_since if self._runs_since else 0.0

    @property
    def is_running(self) -> bool:
        return self._left_s > self._ran_s()

    @property
    def share(self) -> float:
        return 1 - (self._left_s - self._ran_s()) / 2

    def steps_s(self) -> list[float]:
        return []

    def signal(self, number: signal.Signals) -> None:
        now = time.monotonic()
        if number == signal.SIGCONT and self._stopped_at is not None:
            self.stops.append(now - self._stopped_at)
            self._stopped_at = None
        if number == signal.SIGCONT and not self._runs_since:
            self._runs_since = now
        if number == signal.SIGSTOP and self._stopped_at is None:
            self._stopped_at = now
            self._left_s, self._runs_since = self._left_s - self._ran_s(), 0.0


def test_no_stop_is_shorter_than_a_turn() -> None:
    """Also when the other run ends early in its turn; it would count as a part of a step."""
    sides: Any = [Dummy("short", 0.45), Dummy("long", 0.9)]
    take_turns(sides, 0.3)
    assert sides[0].stops and sides[1].stops
    assert min(sides[0].stops + sides[1].stops) >= 0.3


def sweep_of(folder: Path) -> Path:
    """Runs of a second or two on two ranks each."""
    parallel = {**stagehand.LAYOUTS["DP=2"], "timeout_s": 100}
    steps = ["stages.*.steps=80", "checkpoint.interval_steps=null"]
    (folder / "bad.json").write_text(json.dumps([{"id": "0", "conversations": []}] * 8))
    (folder / "config.yaml").write_text(yaml.safe_dump(stagehand.config(parallel=parallel)))
    cases = {"dense": ["stages.*.vtc=null", "stages.*.lds=null"], "sparse": [], "broken": ["stages.*.data.source=llava_json", f"stages.*.data.path={folder}/bad.json"]}  # fmt: skip
    (folder / "pairs.yaml").write_text(
        yaml.safe_dump({"config": "config.yaml", "overrides": steps, "cases": cases}, sort_keys=False)
    )
    return folder / "pairs.yaml"


def test_two_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(TOOL), str(sweep_of(tmp_path)), "dense", "sparse", "--turn-s", "2", "--out", str(out), "--json"]  # fmt: skip
    run = warm.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert [[(each["run"], each["stage"], each["num_steps"]) for each in stages] for stages in found] == [
        [(name, stage, 80) for stage in ("alignment", "finetune")] for name in ("dense", "sparse")
    ]
    assert all(sum(each["num_stopped"] for each in stages) > 0 for stages in found)
    dense, sparse = found
    assert all(a["flops_executed"] > b["flops_executed"] for a, b in zip(dense, sparse, strict=True))
    alone = tmp_path / "alone"
    told = warm.run([sys.executable, "-m", "megatron_sts", "train", str(tmp_path / "config.yaml"), "stages.*.steps=80", "--run-dir", str(alone)], timeout=240)  # fmt: skip
    assert told.returncode == 0
    losses = [[(line["stage"], line["step"], line["loss"]) for line in stagehand.lines(folder) if "loss" in line] for folder in (alone, out / "sparse")]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        (["dense", "dense"], "RUN=dense: it is given twice; give two runs"),
        (["dense", "spars"], "RUN=spars: .* has no such run; give two of dense, sparse, broken"),
        (["dense", "broken"], "broken failed with status [1-9]: .*error: .*max_bad_fraction"),
    ],
)
def test_what_cannot_be_timed_is_told(tmp_path: Path, runs: list[str], said: str) -> None:
    command = [sys.executable, str(TOOL), str(sweep_of(tmp_path)), *runs, "--turn-s", "2"]
    run = warm.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == (1 if "broken" in runs else 2)
    assert not left_of(tmp_path)
    assert re.search(said, " ".join(run.stderr.split()))


def left_of(folder: Path) -> list[str]:
    """Processes of runs there, stopped or not."""
    return [line for each in psutil.process_iter(["cmdline"]) if str(folder) in (line := " ".join(each.info["cmdline"] or ()))]  # fmt: skip


def test_nothing_is_left_by_a_signal(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), str(sweep_of(tmp_path)), "dense", "sparse", "--out", str(tmp_path / "out")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as tool:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("out/*/metrics.jsonl")):
            assert tool.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        assert len(left_of(tmp_path)) >= 3
        tool.terminate()
        assert tool.wait(timeout=90) == 128 + signal.SIGTERM
    assert not left_of(tmp_path)
