"""The batch script: one template, whose words no shell interprets, and jobs that are checked before they are submitted."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sts.cli import main
from megatron_sts.commands.launch_options import PASSED_ON
from megatron_sts.config.errors import ConfigError
from megatron_sts.launch import slurm_script, slurm_submit
from megatron_sts.launch.slurm_submit import array_numbers

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "examples/quickstart")
ON_CPUS = ("--gpus-per-node", "0", "--ranks-per-node", "1")


def test_the_hand_written_script_is_the_template() -> None:
    """After a change of ``job.sbatch``: write ``slurm_script.hand_written()`` there."""
    assert (ROOT / "launch/slurm/train.sbatch").read_text() == slurm_script.hand_written()


def test_scripts_are_bash() -> None:
    job = slurm_script.Job([("nodes", "2")], Path("/a b"), Path("/run"), "python", 8, "srun", ["a=$(exit 1)"])
    subprocess.run(["bash", "-n"], input=slurm_script.render(job), text=True, check=True)


@settings(max_examples=60)
@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), max_size=4))
def test_words_arrive_as_written(words: list[str]) -> None:
    words = [*words, "a b", "$HOME `id` \"'\\", ";rm -rf /tmp/x", "two\nlines\r\n#SBATCH --nodes=9", "", "{}*?~!é"]
    line = " ".join(["printf '%s\\0'", *map(slurm_script.quote, words)])
    assert len(line.splitlines()) == 1 and line.isascii()
    said = subprocess.run(["bash", "-c", line], capture_output=True, check=True).stdout
    assert said.decode().split("\0")[:-1] == words


def launch(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    status = main(["launch", "slurm", QUICKSTART, *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_dry_run_prints_the_script_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "a run"
    options = [word for name in PASSED_ON if name != "array" for word in (f"--{name}", f"some {name}")]
    more = (
        "--exclusive",
        "--sbatch=--hint=nomultithread",
        "--sbatch",
        "signal=B:USR1@600",
        "--env",
        "NCCL_IB_HCA=mlx5 0",
    )
    words = ("--nodes", "2", "--gpus-per-node", "1", "--cpus-per-rank", "12", "--srun-ranks", "--container", "a#b:1")
    status, script, error = launch(*words, "--dry-run", "--run-dir", str(run), *options, *more, "seed=7", capsys=capsys)
    assert status == 0 and not run.exists()
    assert error == (
        "megatron-sts: the config fits 2 nodes x 1 rank = tensor 1 x context 1 x pipeline 1 x data 2; without --dry-run a job would "
        f"be submitted as {run}/launch/001/job.sbatch; nothing was written or submitted, and SLURM was not asked\n"
    )
    lines = script.splitlines()
    expected = [
        "nodes=2",
        "ntasks-per-node=1",
        "gpus-per-node=1",
        "cpus-per-task=12",
        'partition="some partition"',
        "exclusive",
    ]
    expected += ["hint=nomultithread", "signal=B:USR1@600", "requeue", f'output="{run}/launch/001/job-%j.out"']
    assert [f"#SBATCH --{line}" for line in expected if f"#SBATCH --{line}" not in lines] == []
    assert "#SBATCH --signal=B:USR1@180" not in lines
    assert "export NCCL_IB_HCA='mlx5 0'" in lines and "container='a#b:1'" in lines and "launcher=srun" in lines
    assert f"set -- '{run}/launch/001/config.yaml' seed=7" in lines


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--nodes", "3", *ON_CPUS),
            "--nodes=3 (x 1 rank a node, by --ranks-per-node, else --gpus-per-node): parallel.data_parallel_size=2: tensor x pipeline x context x data = 2 ranks, but 3 run",
        ),
        (("--nodes", "1"), "--nodes=1 (x 8 ranks a node, by --ranks-per-node, else --gpus-per-node): parallel."),
        (("--nodes", "2", "--gpus-per-node", "0"), "--ranks-per-node"),
        (("--nodes", "2", "--gpus-per-node", "1", "--ranks-per-node", "2"), "--ranks-per-node=2"),
        (("--nodes", "2", *ON_CPUS, "sead=1"), "did you mean seed?"),
        (("--nodes", "2", *ON_CPUS, "--env", "A B=1"), "--env=A B=1"),
        (("--nodes", "2", *ON_CPUS, "--array", "0-x"), "'0-x'"),
        (("--nodes", "2", *ON_CPUS, "--array", "0-1", "--run-dir", "one"), "--run-dir=one"),
        (
            ("--nodes", "2", *ON_CPUS, "--array", "0-1", "stages.finetune.batch.micro_batch_size={array}"),
            "micro_batch_size=0",
        ),
    ],
)
def test_refused_before_it_is_submitted(words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, error = launch(*words, "--dry-run", capsys=capsys)
    assert (status, out) == (2, "")
    assert error.count("\n") == 1 and error.startswith("megatron-sts: error: ") and said in error


def test_a_port_on_which_somebody_listens_is_left_alone() -> None:
    text = slurm_script.TEMPLATE.read_text()
    choice = text[text.index("is_taken()") : text.index("export MASTER_PORT")]
    with socket.create_server(("127.0.0.1", 20000 + 7 * 5 + 1)):
        script = f"unset MASTER_PORT; SLURM_JOB_ID=5 restart=1\n{choice}\necho $MASTER_PORT"
        said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout
    assert said == "20037\n"


FAKES = {
    "sinfo": """case $* in
  *%c*) printf '%s\\n' 'a1|8|100|gpu:8|ib|mixed' 'a2|8|100|gpu:8|ib|idle' 'a3|8|100|gpu:8|ib|idle*' 'a4|8|100|gpu:8|ib|down' \\
    'b1|8|100|gpu:4|ib|idle' 'a5|8|100|gpu:8|ib|idle~' ;;
  *) printf '%s\\n' 'a1 mixed' 'a2 mixed' 'a3 mixed*' ;;
esac""",
    "scontrol": """case $* in
  *'show config') echo 'SlurmdPort              = {port}' ;;
  *'show node'*) echo 'NodeName=a1 Arch=x NodeAddr=127.0.0.1 NodeHostName=a1 Port={port} CPUs=8'
    echo 'NodeName=a2 NodeAddr=127.0.0.1 NodeHostName=a2 Port={closed} CPUs=8'
    echo 'NodeName=a3 NodeAddr=127.0.0.1 NodeHostName=a3' ;;
esac""",
}


def test_nodes_that_slurm_has_not_missed_yet(tmp_path: Path) -> None:
    """Nobody answers at a2's port; SLURM knows of a3. Of the others only a1 and a5, which can be woken, are like them and free."""
    text = slurm_script.TEMPLATE.read_text()
    functions = "".join(re.findall(r"^(?:lost_nodes|slurmd_ports|num_others)\(\) \{.*?^\}\n", text, re.M | re.S))
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # but nobody listens
        for name, body in FAKES.items():
            body = body.replace("{port}", str(listener.getsockname()[1])).replace(
                "{closed}", str(closed.getsockname()[1])
            )
            (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
            (tmp_path / name).chmod(0o755)
        script = f"set -euo pipefail\nSLURM_JOB_NODELIST=a SLURM_JOB_PARTITION=p nodes=$'a1\\na2\\na3'\n{functions}\nlost_nodes\nnum_others a2"
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("a2\na3\n2\n", "")


def test_a_controller_that_does_not_answer_is_no_end_of_a_job(tmp_path: Path, monkeypatch) -> None:
    """What squeue of SLURM 22.05 says: nothing for a while, a state, and of a job that is forgotten."""
    said = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
    squeue = tmp_path / "squeue"
    squeue.write_text(
        f"""#!/bin/sh
echo >>{tmp_path}/calls
case $(wc -l <{tmp_path}/calls) in
  1 | 3) echo '{said}' >&2; exit 1 ;;
  2) echo RUNNING ;;
  *) echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1 ;;
esac
"""
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm_submit, "POLL_S", 0.0)
    assert slurm_submit.follow("7", tmp_path / "log") == "RUNNING"
    assert (tmp_path / "calls").read_text() == "\n" * 4


def test_numbers_of_an_array() -> None:
    assert list(array_numbers("0-8:4,11%2")) == [0, 4, 8, 11]
    with pytest.raises(ConfigError, match=r"^--array=3-: '3-' is neither a number nor a range"):
        list(array_numbers("3-"))


COMMANDS = re.findall(
    r"^megatron-sts launch slurm CONFIG\.yaml (.*)$",
    (ROOT / "README.md").read_text() + (ROOT / "launch/slurm/README.md").read_text(),
    re.M,
)


@pytest.mark.parametrize("words", [*COMMANDS, "--nodes 8 --array 0-3 --run-dir runs/seed-{array} seed={array}"])
def test_documented_commands_fit_the_70b_example(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "examples/llava_llama3_70b")
    assert len(COMMANDS) == 2
    assert main(["launch", "slurm", config, "parallel.data_parallel_size=null", *words.split(), "--dry-run"]) == 0
    assert "#SBATCH --nodes=8\n" in capsys.readouterr().out
