"""Jobs that are not submitted: what the user is told, and that nothing is left behind. sbatch is a stand-in that says what SLURM 22.05 said."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest

from megatron_sts.cli import main
from megatron_sts.commands.launch_options import OWN
from megatron_sts.launch import lease, slurm_script, slurm_submit
from megatron_sts.launch.slurm_refusal import explain

ROOT = Path(__file__).parents[2]
PLACE = ("launch", "slurm", str(ROOT / "examples/quickstart"), "--nodes", "2", "--gpus-per-node", "0", "--ranks-per-node", "1")  # fmt: skip


def said_by(words: tuple[str, ...], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    capsys.readouterr()
    assert main([*PLACE, *words]) == status
    return capsys.readouterr().err


def stand_in(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An sbatch that does this instead."""
    path = folder / "bin/sbatch"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", "SLURM does not answer here"),
        ("sbatch: error: Munge encode failed: Failed to access\nallocation failure: Protocol authentication error", "--dry-run shows the script"),
        ("sbatch: fatal: Could not establish a configuration source", "SLURM does not answer here (Could not"),
        ("sbatch: unrecognized option '--foo=3'\nTry \"sbatch --help\" for more information", "refused --foo (unrecognized option '--foo=3'); "),
        ("sbatch: option '--no=3' is ambiguous; possibilities: '--no-kill' '--nodes'\nTry \"sbatch --help\" for more information", "refused --no ("),
        ("sbatch: error: Invalid --time specification", "refused --time ("),
        ('sbatch: error: unrecognized --hint argument "x", see --hint=help', "refused --hint ("),
        ("sbatch: error: invalid partition specified: none\nallocation failure: Invalid partition name specified", "refused --partition ("),
        ("sbatch: error: Invalid generic resource (gres) specification", "refused --gres ("),
        ("allocation failure: Invalid feature specification", "refused --constraint ("),
        ("allocation failure: Invalid node name specified", "refused --nodelist or --exclude ("),
        ("allocation failure: Job dependency problem", "refused --dependency ("),
        ("allocation failure: Requested node configuration is not available", "no (allocation failure: Requested node configuration is not available); ask"),
    ],
)  # fmt: skip
def test_what_sbatch_says_decides_the_remedy(said: str, told: str) -> None:
    line = explain(said, "no", "ask")
    assert told in line and "\n" not in line and "Try" not in line


def test_what_is_refused_leaves_nothing_behind(tmp_path: Path, monkeypatch, capsys) -> None:
    run = tmp_path / "new/run"
    words = ("--run-dir", str(run))
    stand_in(
        tmp_path, "echo 'allocation failure: Requested node configuration is not available' >&2; exit 1", monkeypatch
    )
    assert "give --untested to queue it all the same" in said_by(words, capsys)
    assert not (tmp_path / "new").exists()
    refused = "echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy' >&2; exit 1"
    stand_in(tmp_path, f"case $1 in --test-only) exit 0;; esac\n{refused}", monkeypatch)
    run.mkdir(parents=True)
    (run / "metrics.jsonl").touch()
    assert "sbatch refused this job (Batch job submission failed: Job violates" in said_by(words, capsys)
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "sbatch: no such program here" in said_by(words, capsys)
    assert "pyxis" in said_by((*words, "--container", "image"), capsys)
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]


def test_a_chain_that_is_taken_in_part_says_which_jobs_there_are(tmp_path: Path, monkeypatch, capsys) -> None:
    """What was submitted is kept, without git too, and for nobody else to read."""
    body = f"""case $* in
  *--test-only*) ;;
  *afterany*) echo 'sbatch: error: Batch job submission failed: Job violates accounting/QOS policy' >&2; exit 1 ;;
  *) echo 7 >>{tmp_path}/calls; echo 7 ;;
esac"""
    stand_in(tmp_path, body, monkeypatch)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    run = tmp_path / "a run"
    mask = os.umask(0o077)
    try:
        told = said_by(("--run-dir", str(run), "--chain", "3"), capsys)
    finally:
        os.umask(mask)
    assert "of the 3 jobs of --chain only 7 were submitted, which scancel ends: sbatch refused this job" in told
    assert stat.S_IMODE((run / "launch/001/job.sbatch").stat().st_mode) == 0o700
    assert json.loads((run / "launch/001/code.json").read_text())["version"]


def test_ctrl_c_ends_following_and_not_the_job(tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(job: str, log: Path) -> str:
        raise KeyboardInterrupt

    stand_in(tmp_path, "echo 7", monkeypatch)
    monkeypatch.setattr(slurm_submit, "follow", interrupted)
    run = tmp_path / "it's a run"
    assert main([*PLACE, "--run-dir", str(run), "--follow"]) == 130
    told = capsys.readouterr()
    assert told.err == "\nmegatron-sts: no longer following; job 7 goes on (scancel 7 ends it)\n"
    assert f"tail -F {slurm_script.quote(str(run / 'launch/001'))[:-1]}" in told.out.replace("'\"'\"'", "'\\''")


def test_a_folder_that_a_run_holds_is_warned_of(tmp_path: Path, capsys) -> None:
    words = ("--run-dir", str(tmp_path), "--dry-run")
    assert "warning" not in said_by(words, capsys, status=0)
    held = lease.take(tmp_path, {"SLURM_JOB_ID": "7"})
    told = said_by(words, capsys, status=0)
    assert (
        f"megatron-sts: warning: {tmp_path}: a run is writing it ({os.uname().nodename}, pid {os.getpid()}, job 7); "
        in told
    )
    held.release()
    assert "warning" not in said_by(words, capsys, status=0)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--sbatch", "nodes=3"), "--sbatch=nodes=3: the script sets nodes itself; give --nodes"),
        (("--sbatch=--part=a",), "--sbatch=--part=a: the script sets partition itself; give --partition"),
        (("--sbatch", "cpus-per-task=9"), "give --cpus-per-rank"),
        (("--sbatch", "gpus=9"), "give --gpus-per-node"),
        (("--sbatch", "no-requeue"), "give --no-requeue"),
        (("--sbatch=-N3",), "not NAME=VALUE with an option's long name"),
        (("--sbatch", "nodes 3"), "not NAME=VALUE with an option's long name"),
        (("seed={array}",), "seed={array}: {array} stands for the number of a job array; it needs --array"),
        (("--run-dir", "runs/{array}"), "it needs --array"),
        (("--python", "no/python"), "--python=no/python: no program here; correct it, or, if only the nodes have it, give --untested"),
    ],
)  # fmt: skip
def test_options_that_contradict_are_refused(words: tuple[str, ...], told: str, capsys) -> None:
    said = said_by((*words, "--dry-run"), capsys)
    assert said.count("\n") == 1 and told in said


def test_nothing_that_the_script_sets_gets_past_its_option(tmp_path: Path, capsys) -> None:
    """But for what makes a job last, and its name, which may be replaced."""
    said_by(
        ("--dry-run", "--cpus-per-rank", "1", "--exclusive", "--untested", "--python", "no/python"), capsys, status=0
    )
    assert main([*PLACE, "--dry-run", "--sbatch", "job-name=mine", "--sbatch", "signal=B:USR1@600"]) == 0
    lines = [line.removeprefix("#SBATCH --") for line in capsys.readouterr().out.splitlines() if "#SBATCH" in line]
    names = [line.partition("=")[0] for line in lines]
    assert len(set(names)) == len(names) and {"job-name=mine", "signal=B:USR1@600"} <= set(lines)
    assert set(names) - OWN.keys() == {"job-name", "signal", "open-mode"}


@pytest.mark.parametrize(
    ("words", "jobs"),
    [
        (("--chain", "3"), "3 jobs, each going on once the one before has ended, would"),
        (("--array", "0-2"), "an array of jobs (0-2) would"),
        (("--chain", "3", "--array", "0-2"), "3 arrays of jobs (0-2 each), each going on once the one before has ended, would"),
    ],
)  # fmt: skip
def test_a_dry_run_says_what_would_be_submitted(words: tuple[str, ...], jobs: str, capsys) -> None:
    assert f"without --dry-run {jobs} be submitted" in said_by((*words, "--dry-run"), capsys, status=0)
