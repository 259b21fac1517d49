"""``megatron-sts sweep``: which runs a file means, and that they are trained once, tabled, and failures told."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sts.cli import main
from megatron_sts.commands.sweep import told_end
from megatron_sts.commands.sweep_runs import Ended, Processes
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.sweep import Sweep, SweepRun, read, runs_of
from megatron_sts.report import sweep as table
from tests.train.stagehand import config as small_config

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "sweep.yaml"


def test_every_combination_is_a_run() -> None:
    sweep = Sweep(
        config=".",
        overrides=("logging.tensorboard=false",),
        cases={"dense": ("stages.*.lds=null",), "sts": ()},
        grid={"stages.a.lds.alpha": (0.3, 0.5), "stages.b.lds.alpha": (0.1,), "parallel.layout": ([1, 3],)},
        seeds=(1, 2),
    )
    runs = runs_of(sweep)
    assert [run.name for run in runs[:3]] == [
        "dense-a.lds.alpha=0.3-b.lds.alpha=0.1-layout=1_3-seed=1",
        "dense-a.lds.alpha=0.3-b.lds.alpha=0.1-layout=1_3-seed=2",
        "dense-a.lds.alpha=0.5-b.lds.alpha=0.1-layout=1_3-seed=1",
    ]
    assert len({run.name for run in runs}) == len(runs) == 8
    assert runs[0].overrides == (
        "logging.tensorboard=false", "stages.*.lds=null", "stages.a.lds.alpha=0.3", "stages.b.lds.alpha=0.1",
        "parallel.layout=[1, 3]", "seed=1",
    )  # fmt: skip
    assert [run.name for run in runs_of(Sweep(config="."))] == ["run"]


@pytest.mark.parametrize(
    ("written", "said"),
    [
        (
            {"config": ".", "seed": [1]},
            "seed=[1]: unknown key; did you mean seeds?; a sweep has the keys config, overrides",
        ),
        ({"config": ".", "grid": {"seed": []}}, "grid.seed=[]: it should have at least 1 item"),
        ({"config": ".", "cases": {"a/b": []}}, "cases.a/b"),
        ({"config": ".", "seeds": [1, 1]}, "sweep=seed=1: two runs of the sweep have this name"),
    ],
)
def test_a_wrong_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], written: dict[str, Any], said: str
) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(written))
    assert main(["sweep", str(path), "--dry-run"]) == 2
    assert said in (text := capsys.readouterr().err) and text.count("\n") == 1


def test_the_quickstarts_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(runs_of(read(QUICKSTART))) == 12
    assert main(["sweep", str(QUICKSTART.parent), "--dry-run", "--part", "2/5"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in told] == [
        "dense-seed=2", "lds-seed=1", "sts-seed=3", "3 of 12 runs, into runs/sweep",
    ]  # fmt: skip
    assert told[-1].endswith(" FLOPs; minutes are told once one is finished, or for --gflops")
    for wrong in ("0/2", "3/2", "half"):
        assert main(["sweep", str(QUICKSTART), "--dry-run", "--part", wrong]) == 2
        assert f"--part={wrong}" in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_runs_are_trained_once_and_tabled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = small_config(evaluation={"num_questions": 4, "families": ["existence"]}, checkpoint={})
    written["stages"] = [written["stages"][1] | {"steps": 3}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    file, out = tmp_path / "sweep.yaml", tmp_path / "out"
    # The second case's updates are not finite.
    broken = [
        "stages.finetune.optimizer.lr=1e30",
        "stages.finetune.optimizer.warmup_steps=0",
        "stages.finetune.steps=12",
    ]
    sweep = {"config": "config.yaml", "cases": {"good": [], "broken": broken}, "seeds": [1, 2]}
    file.write_text(yaml.safe_dump(sweep, sort_keys=False))
    assert main(["sweep", str(file), "--out", str(out), "--jobs", "2"]) == 1
    said = capsys.readouterr()
    assert "2 of 4 runs failed: broken-seed=1, broken-seed=2" in said.err and "good-seed=2: done" in said.out
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(row["run"], row["status"]) for row in rows] == [
        ("good-seed=1", "done"), ("good-seed=2", "done"), ("broken-seed=1", "failed"), ("broken-seed=2", "failed"),
    ]  # fmt: skip
    assert "guard.max_broken_updates" in rows[2]["cause"]
    for row in rows[:2]:
        lines = [json.loads(line) for line in (out / row["run"] / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "event" not in line]
        assert row["finetune.flops_executed"] == sum(line["flops_executed"] for line in steps)
        assert row["finetune.last_loss"] == pytest.approx(sum(line["loss"] for line in steps) / 3)
        evaluation = json.loads((out / row["run"] / "evaluation.json").read_text())
        assert row["eval.existence"] == row["eval.mean"] == evaluation["splits"]["eval"]["existence"]["accuracy"]
    with (out / "results.csv").open() as table:
        assert [row["seed"] for row in csv.DictReader(table)] == ["1", "2", "1", "2"]
    before = (out / "good-seed=1" / "metrics.jsonl").stat().st_mtime_ns
    file.write_text(yaml.safe_dump(sweep | {"cases": {"good": []}}))
    assert main(["sweep", str(file), "--out", str(out)]) == 0
    assert (out / "good-seed=1" / "metrics.jsonl").stat().st_mtime_ns == before, "a finished run is not repeated"
    capsys.readouterr()
    file.write_text(yaml.safe_dump(sweep | {"cases": {"good": []}, "seeds": [1, 2, 3]}))
    assert main(["sweep", str(file), "--out", str(out), "--dry-run", "--jobs", "2"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    # The third run is to execute what the first two are expected to: their layers are drawn with other seeds.
    assert re.search(
        r"3 of 3 runs, .*: 1 of them not finished, (\S+) FLOPs; about 1 min at the pace of 2 finished ones", said
    )
    flops = float(said.split(" FLOPs")[0].split()[-1])
    assert flops == pytest.approx(sum(line["flops_dense"] for line in steps), rel=0.5)
    assert main(["sweep", str(file), "--out", str(out), "--dry-run", "--gflops", "1"]) == 0
    assert f"about {max(1, round(flops / 60e9))} min of training at 1 GFLOP/s" in capsys.readouterr().out
    file.write_text(yaml.safe_dump(sweep | {"cases": {"good": []}, "overrides": ["stages.finetune.optimizer.lr=0.5"]}))
    assert main(["sweep", str(file), "--out", str(out)]) == 2
    assert f"lr=0.5: {out / 'good-seed=1'} holds a run with stages.finetune.opt" in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_a_stopped_sweep_leaves_no_run_alone(tmp_path: Path) -> None:
    """Started as by ``nohup``, it does not hear SIGHUP; by SIGTERM its run saves and ends, and no other begins."""
    written = small_config(evaluation={"num_questions": 0}, checkpoint={}) | {"logging": {"tensorboard": False}}
    written["stages"] = [written["stages"][1] | {"steps": 100_000}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"config": "config.yaml", "seeds": [1, 2]}))
    out = tmp_path / "out"
    first = out / "seed=1"
    command = [sys.executable, "-m", "megatron_sts", "sweep", str(tmp_path / "sweep.yaml"), "--out", str(out)]
    sweep = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )
    try:
        wait_for(lambda: num_steps(first) > 0)
        sweep.send_signal(signal.SIGHUP)
        before = num_steps(first)
        wait_for(lambda: num_steps(first) > before + 20)  # it neither ends nor is about to
        sweep.send_signal(signal.SIGTERM)
        told, _ = sweep.communicate(timeout=60)
    finally:
        sweep.kill()
    assert re.findall("(seed=.: started.*)", told) == [f"seed=1: started, see {first / 'sweep.log'}"]
    assert sweep.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM; the same command goes on" in told
    assert "seed=1: stopped after" in told and "failed" not in told
    assert list((first / "checkpoints").rglob("*.json")), "its run saved"
    assert json.loads((first / "outcome.json").read_text())["outcome"] == "stopped"
    assert [json.loads(line)["status"] for line in (out / "results.jsonl").open()] == ["stopped", "missing"]
    assert not (out / "seed=2").exists() and os.fsencode(out) not in processes()


def num_steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count('"step_time_s"') if file.is_file() else 0


def test_a_run_that_does_not_listen_is_killed_by_ctrl_c(tmp_path: Path) -> None:
    """Not by what a batch system repeats."""
    processes = Processes()
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(processes.run, [sys.executable, "-c", deaf], tmp_path / "run" / "log")
        wait_for(lambda: (tmp_path / "run/log").is_file() and "deaf" in (tmp_path / "run/log").read_text())
        processes._stop(signal.SIGUSR1, None)
        for repeated in (signal.SIGUSR1, signal.SIGTERM):
            processes._stop(repeated, None)
        time.sleep(1.5)
        assert not ended.done()
        processes._stop(signal.SIGINT, None)
        assert ended.result(timeout=20) == Ended(-signal.SIGKILL, is_stopped=True)
        assert processes.stopped_by == signal.SIGUSR1
    assert processes.run(["true"], tmp_path / "other" / "log") is None and not (tmp_path / "other").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_what_stops_a_sweep_is_its_own_while_it_trains(number: signal.Signals, tmp_path: Path) -> None:
    """Also where whoever started it holds SIGUSR1."""
    processes, before = Processes(), signal.getsignal(number)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    try:
        with processes.obeying_signals():
            os.kill(os.getpid(), number)
            assert processes.run(["true"], tmp_path / "run" / "log") is None
        assert processes.stopped_by == number and signal.getsignal(number) == before
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@pytest.mark.parametrize(
    ("ends", "stopped_by", "status", "said"),
    [
        ((Ended(0), Ended(0)), None, 0, ""),
        ((Ended(0), Ended(1)), None, 1, "1 of 2 runs failed: b\n"),
        ((Ended(0), Ended(0)), 15, 0, ""),  # it came too late
        ((Ended(143, is_stopped=True), None), 2, 130, "stopped by SIGINT; the same command goes on\n"),
        (
            (Ended(1), Ended(-9, is_stopped=True)),
            15,
            143,
            "1 of 2 runs failed: a\nmegatron-sts: stopped by SIGTERM; the same command goes on\n",
        ),
        ((Ended(143), Ended(0)), None, 1, "1 of 2 runs failed: a\n"),  # ended by somebody else
    ],
)
def test_how_a_sweep_ended(
    ends: tuple[Ended | None, ...],
    stopped_by: int | None,
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs = [SweepRun(name=name, case=None, values={}, seed=None, overrides=()) for name in ("a", "b")]
    rows = [
        {"run": run.name, "status": "done" if ended == Ended(0) else "x"} for run, ended in zip(runs, ends, strict=True)
    ]
    assert told_end(runs, ends, rows, stopped_by, Path("results.csv")) == status
    told = capsys.readouterr()
    assert told.err.endswith(said) and f"has {ends.count(Ended(0))} runs of 2 that are done" in told.out


def test_a_run_that_saved_and_ended_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    """As SIGUSR1, sent to it alone, has it do."""
    runs = [SweepRun(name=name, case=None, values={}, seed=None, overrides=()) for name in ("a", "b")]
    rows = [{"run": "a", "status": "stopped"}, {"run": "b", "status": "done"}]
    assert told_end(runs, [Ended(0), Ended(0)], rows, None, Path("results.csv")) == 1
    assert capsys.readouterr().err == "megatron-sts: error: 1 of 2 runs ended before they were done: a; the same command goes on\n"  # fmt: skip


@pytest.mark.parametrize(("status", "is_stopped"), [(143, True), (2, False), (0, False)])
def test_a_run_that_was_asked_to_end_is_stopped_if_it_ends_for_that(
    status: int, is_stopped: bool, tmp_path: Path
) -> None:
    """One that is refused at that moment has failed, one that came to its end is done."""
    processes = Processes()
    code = f"import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit({status})); print('on', flush=True); time.sleep(600)"
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(processes.run, [sys.executable, "-c", code], log := tmp_path / "log")
        wait_for(lambda: log.is_file() and "on" in log.read_text())
        processes._stop(signal.SIGTERM, None)
        assert ended.result(timeout=20) == Ended(status, is_stopped=is_stopped)


def wait_for(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def processes() -> bytes:
    """The command lines of all that runs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended
            found.append(path.read_bytes())
    return b"\n".join(found)


def test_a_run_that_could_not_start_keeps_all_from_starting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(small_config()))
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"config": "config.yaml", "grid": {"stages.finetune.lds.alpha": [0.5, 1.5]}}))
    assert main(["sweep", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "run alpha=1.5 of the sweep: stages.finetune.lds.alpha=1.5" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parts_that_end_at_once_leave_a_table_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one reads, then a run of the other ends, whose table must not be overwritten by what the first one read."""
    runs = runs_of(Sweep(config=".", seeds=(1, 2)))
    for run in runs:
        (tmp_path / run.name).mkdir()
    read, reads = threading.Event(), iter((True, False))

    def rows(of: Any, out: Path, _: object) -> list[dict[str, Any]]:
        found = [
            {"run": run.name, "status": "done" if (out / run.name / "ended").exists() else "missing"} for run in of
        ]
        if next(reads):
            read.set()
            time.sleep(0.3)
        return found

    monkeypatch.setattr(table, "rows_of", rows)
    (tmp_path / runs[0].name / "ended").touch()
    first = threading.Thread(target=table.update, args=(runs, tmp_path))
    first.start()
    assert read.wait(10)
    (tmp_path / runs[1].name / "ended").touch()
    table.update(runs, tmp_path)
    first.join()
    rows_now = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["status"] for row in rows_now] == ["done", "done"]


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        read(tmp_path / "none.yaml")
