"""``megatron-sts sweep`` over folders that earlier starts left, and on machines that lack files. Nothing is trained."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from megatron_sts.cli import main
from megatron_sts.commands.sweep_runs import Processes
from megatron_sts.config.load import load
from megatron_sts.config.resolve import resolve
from megatron_sts.config.sweep import read, runs_of
from megatron_sts.launch import outcome
from megatron_sts.report.sweep import update
from megatron_sts.runtime.kernels import Kernels
from megatron_sts.train.resume import write_config
from tests.train import stagehand

KERNELS = Kernels(*("torch",) * 4, "off", "megatron-core", ())  # type: ignore[arg-type]


class Given:
    """A sweep of two seeds, and what is in its folder."""

    def __init__(self, folder: Path) -> None:
        self.config, self.file, self.out = folder / "config.yaml", folder / "sweep.yaml", folder / "out"
        self.config.write_text(yaml.safe_dump(stagehand.config()))
        self.write()

    def write(self, **changes: Any) -> None:
        self.file.write_text(yaml.safe_dump({"config": "config.yaml", "seeds": [1, 2]} | changes))

    def finished(self, name: str, *overrides: str) -> Path:
        """A run that was trained to its end, with its last checkpoint."""
        folder, resolved = self.out / name, resolve(load(self.config, overrides))
        write_config(resolved, folder, KERNELS, {})
        steps = [{"stage": stage.name, "step": step} for stage in resolved.stages for step in range(stage.num_steps)]
        measured = {
            "loss": 1.0,
            "flops_executed": 1,
            "flops_dense": 1,
            "step_time_s": 1.0,
            "tokens": 1,
            "peak_memory_bytes": 1,
        }
        (folder / "metrics.jsonl").write_text("".join(json.dumps(step | measured) + "\n" for step in steps))
        last = resolved.stages[-1]
        checkpoint = folder / "checkpoints" / f"{last.index}-{last.name}-{last.num_steps:07}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "progress.json").write_text(json.dumps({"stage": last.index, "step": last.num_steps}))
        outcome.write(folder, "done")
        return folder

    def sweep(self, *words: str) -> int:
        return main(["sweep", str(self.file), "--out", str(self.out), *words])


@pytest.fixture
def given(tmp_path: Path) -> Given:
    return Given(tmp_path)


@pytest.mark.parametrize(
    ("edit", "differs", "remedy"),
    [
        ("stages.finetune.optimizer.lr=0.002", "0.002: {} holds a run with {}=0.001", "restore that value to go on, or"),
        ("stages.finetune.steps=9", "9: {} holds a run in which that stage has 4 steps, not 9", "use `train --extend` to go on with"),
    ],
)  # fmt: skip
def test_runs_of_another_config_keep_all_from_starting(
    given: Given, capsys: pytest.CaptureFixture[str], edit: str, differs: str, remedy: str
) -> None:
    """In the words of ``train``, whichever part of the sweep is asked for; the table of the sweep that was stays."""
    for seed in (1, 2):
        given.finished(f"seed={seed}", f"seed={seed}")
    (table := given.out / "results.csv").write_text("of the sweep that was\n")
    assert given.sweep("--dry-run") == 0 and capsys.readouterr().out.endswith("all of them finished\n")
    given.write(overrides=[edit], seeds=[3, 1, 2])
    field = edit.partition("=")[0]
    said = [f"{field}={differs.format(given.out / name, field)}; {remedy} " for name in ("seed=1", "seed=2")]
    first = f"megatron-sts: error: run seed=1 of the sweep (and 1 more of its runs): {said[0]}"
    assert given.sweep("--dry-run") == 2
    told = capsys.readouterr()
    lines = [line for line in told.out.splitlines() if "will not start" in line]
    for line, name, problem in zip(lines, ("seed=1", "seed=2"), said, strict=True):
        assert line.startswith(f"{name}: will not start: {problem}") and line.endswith(" give another --out")
    assert "FLOPs" not in told.out and told.err.startswith(first) and told.err.count("\n") == 1
    assert given.sweep("--part", "1/3") == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.startswith(first) and told.err.count("\n") == 1
    assert not (given.out / "seed=3").exists() and table.read_text() == "of the sweep that was\n"
    assert main(["train", str(given.config), edit, "seed=1", "--run-dir", str(given.out / "seed=1")]) == 2
    assert differs.format(given.out / "seed=1", field) in capsys.readouterr().err


def test_runs_that_can_go_on_do(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    """Where only logging and saving are others, and where no checkpoint is left of an earlier start."""
    given.finished("seed=1", "seed=1")
    begun = given.out / "seed=2"
    write_config(resolve(load(given.config, ["seed=7"])), begun, KERNELS, {})
    given.write(overrides=["logging.interval_steps=2", "checkpoint.interval_steps=3"])
    assert given.sweep("--dry-run") == 0
    assert "1 of them not finished" in capsys.readouterr().out


def test_what_this_machine_lacks_is_told(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    """Not refused: another machine may have it, or an earlier sweep makes it first. Finished runs need it no more."""
    absent = "model.language.init=runs/nothing"
    given.write(overrides=[absent, "model.vision.init=runs/no"], seeds=[1, 2])
    given.finished("seed=2", "seed=2", absent, "model.vision.init=runs/no")
    assert given.sweep("--dry-run") == 0
    told = capsys.readouterr().out.splitlines()
    assert [line.partition(": no such file")[0] for line in told[2:-1]] == [
        f"seed=1: will not start on this machine: model.{part}.init=runs/{name}"
        for part, name in (("vision", "no"), ("language", "nothing"))
    ]
    assert "1 of them not finished" in told[-1]


def test_what_no_machine_can_start_is_refused(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    """As by ``train --dry-run``: weights of another model."""
    other = given.finished("other")
    wide = [f"model.language.init={other}", "model.language.ffn_hidden_size=128"]
    given.write(cases={"good": [], "wide": wide}, seeds=[])
    assert given.sweep("--dry-run") == 2
    told = capsys.readouterr()
    [line] = [line for line in told.out.splitlines() if "will not start: " in line]
    assert line.startswith(f"wide: will not start: {wide[1]}: ")
    assert told.err.startswith(f"megatron-sts: error: run wide of the sweep: {wide[1]}: ")


def rows(given: Given) -> list[list[str]]:
    """Run, status and cause of each row of the table."""
    with (given.out / "results.csv").open() as file:
        return [[row["run"], row["status"], row["cause"]] for row in csv.DictReader(file)]


@pytest.mark.parametrize("before", [None, "stopped"])
def test_a_run_that_cannot_start_has_failed(
    given: Given, capsys: pytest.CaptureFixture[str], before: Literal["stopped"] | None
) -> None:
    """For the cause in its log, whatever an earlier start came to, and whatever an earlier one wrote there."""
    absent, log = "model.language.init=runs/nothing", given.out / "seed=1" / "sweep.log"
    log.parent.mkdir(parents=True)
    log.write_text("megatron-sts: error: an earlier one\n")
    if before is not None:
        outcome.write(log.parent, before, "SIGTERM")
    given.write(overrides=[absent], seeds=[1])
    assert given.sweep() == 1
    assert "has 0 runs of 1 that are done" in capsys.readouterr().out
    [[name, status, cause]] = rows(given)
    assert (name, status) == ("seed=1", "failed") and cause.startswith(f"{absent}: no such file or folder; ")
    assert log.read_text().endswith(f"megatron-sts: error: {cause}\n")


def test_a_run_that_ends_without_a_word_has_failed(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    given.write(seeds=[1])
    monkeypatch.setattr(Processes, "run", lambda _self, _command, log, *_: quiet(log))
    assert given.sweep() == 1
    assert rows(given) == [["seed=1", "failed", f"ended with status -9, see {given.out / 'seed=1' / 'sweep.log'}"]]


@pytest.mark.parametrize(("stopped_by", "before"), [(None, "done"), (2, None), (2, "stopped")])
def test_what_did_not_fail_of_itself_is_not_failed(
    given: Given, monkeypatch: pytest.MonkeyPatch, stopped_by: int | None, before: Literal["done", "stopped"] | None
) -> None:
    """A finished run keeps its numbers though it could not look into its folder again; one that the sweep killed goes on."""
    given.write(seeds=[1])
    folder = given.finished("seed=1", "seed=1")
    (folder / "outcome.json").unlink()
    if before is not None:
        outcome.write(folder, before)

    def killed(processes: Processes, _command: list[str], log: Path, *_: object) -> int:
        processes.stopped_by = stopped_by
        return quiet(log)

    monkeypatch.setattr(Processes, "run", killed)
    given.sweep()
    assert [status for _, status, _ in rows(given)] == [before or "missing"]


@pytest.mark.parametrize(
    ("name", "text"),
    [("config.resolved.yaml", ""), ("config.resolved.yaml", "a: [b"), ("outcome.json", ""), ("evaluation.json", "{")],
)
def test_a_damaged_folder_is_of_its_run_alone(
    given: Given, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    """Which says so itself: the sweep goes on to its other runs, and their table is written."""
    folder = given.finished("seed=1", "seed=1")
    (folder / name).write_text(text)
    monkeypatch.setattr(Processes, "run", lambda _self, _command, log, *_: quiet(log))
    assert given.sweep("--dry-run") == 0
    capsys.readouterr()
    assert given.sweep() == 1
    assert [name for name, _, _ in rows(given)] == ["seed=1", "seed=2"]


def quiet(log: Path) -> int:
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    return -9


def test_a_stopped_run_reads_so(given: Given) -> None:
    folder = given.out / "seed=1"
    outcome.write(folder, "stopped", "SIGTERM")
    update(runs_of(read(given.file)), given.out)
    assert rows(given) == [["seed=1", "stopped", "SIGTERM"], ["seed=2", "missing", ""]]
