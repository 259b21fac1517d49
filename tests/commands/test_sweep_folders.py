"""``megatron-sts sweep`` over folders that earlier starts left, and on machines that lack files. Nothing is trained."""

from __future__ import annotations

import csv
import errno
import fcntl
import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from megatron_sts.cli import main
from megatron_sts.commands.sweep_runs import Ended, Processes
from megatron_sts.config.load import load
from megatron_sts.config.resolve import resolve
from megatron_sts.config.sweep import read, runs_of
from megatron_sts.launch import lease, outcome
from megatron_sts.report.sweep import UNASKED, update
from megatron_sts.runtime.kernels import Kernels
from megatron_sts.train.content import contents
from megatron_sts.train.resume import evaluation_of, write_config
from tests.train import stagehand

KERNELS = Kernels(*("torch",) * 4, "off", "megatron-core", ())  # type: ignore[arg-type]

SAMPLE = {"id": "1", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}


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
        write_config(resolved, folder, KERNELS, contents(resolved.config))
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


@pytest.mark.parametrize("before", [None, "stopped"])
def test_a_run_that_the_sweep_killed_goes_on(
    given: Given,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    before: Literal["stopped"] | None,
) -> None:
    """It has not failed, in the table as in what is printed."""
    given.write(seeds=[1])
    if before is not None:
        outcome.write(given.out / "seed=1", before)

    def killed(processes: Processes, _command: list[str], log: Path, *_: object) -> Ended:
        processes.stopped_by = signal.SIGINT
        return Ended(quiet(log).status, is_stopped=True)

    monkeypatch.setattr(Processes, "run", killed)
    assert given.sweep() == 128 + signal.SIGINT
    assert [status for _, status, _ in rows(given)] == [before or "missing"]
    told = capsys.readouterr()
    assert "seed=1: stopped after" in told.out and "failed" not in told.out + told.err


def test_a_run_that_dies_after_it_went_on_has_failed(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word, and having forgotten that it was stopped once."""
    given.write(seeds=[1])
    outcome.write(given.out / "seed=1", "stopped")

    def dies(_self: Processes, _command: list[str], log: Path, *_: object) -> Ended:
        outcome.clear(log.parent)
        return quiet(log)

    monkeypatch.setattr(Processes, "run", dies)
    assert given.sweep() == 1
    assert rows(given) == [["seed=1", "failed", f"ended with status -9, see {given.out / 'seed=1' / 'sweep.log'}"]]


def test_a_finished_run_on_other_data_has_failed(
    given: Given, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Its numbers are of data that are gone, those of later runs would not be; it is done again with these put back."""
    samples = tmp_path / "samples.json"
    samples.write_text(json.dumps([SAMPLE]))
    override = f"stages.alignment.data={{source: llava_json, path: {samples}}}"
    given.finished("seed=1", "seed=1", override)
    given.write(overrides=[override], seeds=[1])
    assert given.sweep("--dry-run") == 0 and capsys.readouterr().out.endswith(": all of them finished\n")
    samples.write_text(json.dumps([SAMPLE, SAMPLE]))
    cause = f"holds something else than when the run in {given.out / 'seed=1'} began (samples 1 then, 2 now, "
    assert given.sweep("--dry-run") == 0
    assert f"seed=1: will not start on this machine: stages.alignment.data.path={samples}: {cause}" in capsys.readouterr().out  # fmt: skip
    assert given.sweep() == 1
    [[_, status, told]] = rows(given)
    assert status == "failed" and cause in told
    assert "has 0 runs of 1 that are done" in capsys.readouterr().out
    samples.write_text(json.dumps([SAMPLE]))
    assert given.sweep() == 0 and rows(given) == [["seed=1", "done", ""]]


def test_a_finished_run_that_could_not_look_stays_done(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where its data are not at hand: its numbers stay, though the sweep says that the start failed."""
    given.finished("seed=1", "seed=1")
    given.write(seeds=[1])
    monkeypatch.setattr(Processes, "run", lambda _self, _command, log, *_: quiet(log))
    assert given.sweep() == 1 and rows(given) == [["seed=1", "done", ""]]


def test_a_finished_run_whose_lines_are_damaged_has_failed(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    """Also in the last line and the status, though ``train`` has nothing left to do; the other run is done."""
    folders = [given.finished(f"seed={seed}", f"seed={seed}") for seed in (1, 2)]
    (folders[0] / "metrics.jsonl").write_text("")
    assert given.sweep() == 1
    assert [status for _, status, _ in rows(given)] == ["failed", "done"]
    told = capsys.readouterr()
    assert "has 1 runs of 2 that are done" in told.out and "1 of 2 runs failed: seed=1" in told.err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.resolved.yaml", b"a: 1"),
        ("metrics.jsonl", b"\xff"),
        ("metrics.jsonl", b""),
        ("metrics.jsonl", b'{"stage": "alignment", "step": 0}\n'),
        ("metrics.jsonl", None),
        ("config.resolved.yaml", None),
    ],
)
def test_a_damaged_run_without_checkpoints_is_not_trained_anew(
    given: Given, capsys: pytest.CaptureFixture[str], name: str, content: bytes | None
) -> None:
    """Over what is left of it, however often that is tried; it is told what to do, by a dry run too."""
    folder = given.finished("seed=1", "seed=1")
    shutil.rmtree(folder / "checkpoints")
    (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in (name, "config.resolved.yaml")}
    given.write(seeds=[1])
    for _ in range(2):
        assert given.sweep() == 1
        [[_, status, cause]] = rows(given)
        assert status == "failed" and str(folder / name if content is not None else folder) in cause
    told = (folder / "sweep.log").read_text()
    assert told.count(f"restore it, delete {folder} to train anew, or give another --run-dir\n") == 2
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    assert not (folder / "checkpoints").exists()
    capsys.readouterr()
    assert main(["train", str(given.config), "seed=1", "--run-dir", str(folder), "--dry-run"]) == 0
    assert "".join(capsys.readouterr().out.split("\n")).count(f"{folder / name}: is damaged (") == 1


def test_a_run_that_was_asked_other_questions_is_not_done(given: Given, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Before the sweep has come to it, and where it could not start."""
    folder = given.finished("seed=1", "seed=1")
    few = resolve(load(given.config, ["seed=1", "evaluation.num_questions=8"]))
    (folder / "evaluation.json").write_text(json.dumps({**evaluation_of(few), "splits": {}, "seconds": 1.0}))
    given.write(seeds=[1], overrides=["evaluation.num_questions=8"])
    assert given.sweep("--dry-run") == 0 and capsys.readouterr().out.endswith(": all of them finished\n")
    given.write(seeds=[1], overrides=["evaluation.num_questions=16"])
    assert given.sweep("--dry-run") == 0 and "1 of them not finished, 0 FLOPs; about 1 min" in capsys.readouterr().out
    monkeypatch.setattr(Processes, "run", stopped)
    assert given.sweep() == 128 + signal.SIGINT
    assert rows(given) == [["seed=1", "missing", UNASKED]]
    assert "has 0 runs of 1 that are done" in capsys.readouterr().out
    monkeypatch.setattr(Processes, "run", lambda _self, _command, log, *_: quiet(log))
    assert given.sweep() == 1
    assert [status for _, status, _ in rows(given)] == ["failed"]


def test_a_damaged_evaluation_can_be_asked_again(given: Given) -> None:
    """The table has the remedy of ``train``, not of a report."""
    folder = given.finished("seed=1", "seed=1")
    (folder / "evaluation.json").write_text("{")
    given.write(seeds=[1], overrides=["evaluation.num_questions=8"])
    assert given.sweep() == 1
    [[_, status, cause]] = rows(given)
    assert status == "failed" and cause.endswith("; delete it to have the questions asked again")


def test_the_table_is_renewed_as_each_run_ends(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one ends last."""

    def run(_self: Processes, _command: list[str], log: Path, *_: object) -> Ended:
        deadline = time.monotonic() + 30
        while log.parent.name == "seed=1" and ["seed=2", "done", ""] not in rows(given):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        given.finished(log.parent.name, log.parent.name)
        return Ended(0)

    monkeypatch.setattr(Processes, "run", run)
    assert given.sweep("--jobs", "2") == 0
    assert [status for _, status, _ in rows(given)] == ["done", "done"]


def test_no_run_begins_once_the_table_cannot_be_written(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def run(_self: Processes, _command: list[str], log: Path, *_: object) -> Ended:
        begun.append(log.parent.name)
        if len(begun) == 1:
            (given.out / "results.jsonl").unlink()
            (given.out / "results.jsonl").mkdir()  # nothing replaces a folder
        else:
            time.sleep(3)  # long enough for the sweep to see that
        return Ended(0)

    given.write(seeds=[1, 2, 3, 4])
    monkeypatch.setattr(Processes, "run", run)
    assert given.sweep() != 0
    assert len(begun) < 4


def test_a_folder_that_cannot_be_written_is_of_its_run_alone(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    given.finished("seed=2", "seed=2")
    (given.out / "seed=1").write_text("a file")
    assert given.sweep() == 1
    assert [row[:2] for row in rows(given)] == [["seed=1", "missing"], ["seed=2", "done"]]
    assert "1 of 2 runs failed: seed=1" in capsys.readouterr().err


def test_a_file_system_without_locks_has_tables_too(given: Given, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    given.finished("seed=1", "seed=1")
    given.write(seeds=[1])
    monkeypatch.setattr(fcntl, "flock", refuse)
    update(runs_of(read(given.file)), given.out)
    assert rows(given) == [["seed=1", "done", ""]]


def cut(text: str) -> str:
    """A config without what was derived from it, which is at its end."""
    return text[: text.index("resolved:")]


@pytest.mark.parametrize(
    ("name", "change", "cause"),
    [
        ("config.resolved.yaml", lambda _: b"", "{}: is damaged (holds no keys)"),
        ("config.resolved.yaml", lambda _: b"a: [b", "{}: is damaged (while parsing a flow sequence"),
        ("config.resolved.yaml", lambda text: cut(text).encode(), "{}: is damaged (resolved does not have each stage)"),
        ("config.resolved.yaml", lambda text: text[: text.rindex("num_steps:")].encode(), "{}: is damaged ("),
        ("outcome.json", lambda _: b"", "{} cannot be read"),
        ("evaluation.json", lambda _: b"{", "{}: is damaged (Expecting property name"),
        ("evaluation.json", lambda _: b'{"stage": "finetune"}', "{}: is damaged (has no splits)"),
        ("metrics.jsonl", lambda _: b"", "{}: is damaged (ends before the run did)"),
        ("metrics.jsonl", lambda text: text[: len(text) // 2].encode(), "{}: is damaged (ends before the run did)"),
        ("metrics.jsonl", lambda text: text.encode() + b"\xff", "{}: is damaged ('utf-8' codec can't decode byte"),
    ],
)  # fmt: skip
def test_a_damaged_folder_is_of_its_run_alone(
    given: Given, capsys: pytest.CaptureFixture[str], name: str, change: Callable[[str], bytes], cause: str
) -> None:
    """The table says so, and has the other runs; so does a dry run, of what keeps the run from going on."""
    folders = [given.finished(f"seed={seed}", f"seed={seed}") for seed in (1, 2)]
    file = folders[0] / name
    file.write_bytes(change(file.read_text() if file.is_file() else ""))
    update(runs_of(read(given.file)), given.out)
    (first, status, told), second = rows(given)
    assert (first, status) == ("seed=1", "failed") and told.startswith(cause.format(file))
    assert second == ["seed=2", "done", ""]
    assert given.sweep("--dry-run") == 0
    said = capsys.readouterr().out
    assert "seed=2: will not start" not in said
    assert ("seed=1: will not start on this machine: " in said) == (name == "config.resolved.yaml")


def test_a_dry_run_tells_of_a_damaged_run_that_is_begun(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    folder = given.finished("seed=1", "seed=1")
    (folder / "checkpoints" / "1-finetune-0000004").rename(folder / "checkpoints" / "0-alignment-0000002")
    (folder / "checkpoints" / "0-alignment-0000002" / "progress.json").write_text('{"stage": 0, "step": 2}')
    (folder / "config.resolved.yaml").write_text("a: [b")
    given.write(seeds=[1])
    assert given.sweep("--dry-run") == 0
    assert f"seed=1: will not start on this machine: {folder / 'config.resolved.yaml'}: " in capsys.readouterr().out


def test_a_dry_run_tells_of_a_folder_that_is_held(given: Given, capsys: pytest.CaptureFixture[str]) -> None:
    given.write(seeds=[1])
    (folder := given.out / "seed=1").mkdir(parents=True)
    held = lease.take(folder, {})
    assert given.sweep("--dry-run") == 0
    assert f"seed=1: will not start on this machine: another start is writing {folder} (" in capsys.readouterr().out
    held.release()


def stopped(processes: Processes, *_: object) -> None:
    """A sweep that is stopped before its runs begin."""
    processes.stopped_by = signal.SIGINT


def quiet(log: Path) -> Ended:
    """A run that is killed without a word."""
    log.parent.mkdir(parents=True, exist_ok=True)
    log.touch()
    return Ended(-signal.SIGKILL)


def test_a_stopped_run_reads_so(given: Given) -> None:
    folder = given.out / "seed=1"
    outcome.write(folder, "stopped", "SIGTERM")
    update(runs_of(read(given.file)), given.out)
    assert rows(given) == [["seed=1", "stopped", "SIGTERM"], ["seed=2", "missing", ""]]
