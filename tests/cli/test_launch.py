"""Local ranks, ranks of another launcher, and what is said when one fails. The training loop is a stand-in."""

import json
from pathlib import Path

import pytest

from megatron_sts.commands.train import default_run_dir
from megatron_sts.config.errors import ConfigError
from megatron_sts.launch import outcome
from megatron_sts.launch.cause import Failure
from megatron_sts.launch.environment import Rank, rank_from

FAILURE = """
if rank == 1:
    raise RuntimeError("layer 3 is broken\\nsecond line")
time.sleep(30)
"""
KILLED = """
import signal
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(30)
"""
USER = """
from megatron_sts.config.errors import ConfigError
if rank == 1:
    raise ConfigError("data.path=gone: no such file; correct data.path")
time.sleep(30)
"""


def test_local_ranks(run, config: Path, tmp_path: Path) -> None:
    result = run("train", config, "seed=7", "--nproc", "2", "parallel.tensor_model_parallel_size=2", "--run-dir", "out")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    ranks = [json.loads((tmp_path / "out" / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [rank["RANK"] for rank in ranks] == ["0", "1"]
    assert {rank["world_size"] for rank in ranks} == {2}
    assert {rank["seed"] for rank in ranks} == {7}
    assert {rank["MASTER_ADDR"] for rank in ranks} == {"127.0.0.1"}
    assert all(int(rank["OMP_NUM_THREADS"]) >= 1 for rank in ranks)


def test_default_is_the_parallel_sizes_product(run, config: Path, tmp_path: Path) -> None:
    result = run("train", config, "parallel.data_parallel_size=2", OMP_NUM_THREADS="3")
    assert result.returncode == 0, result.stderr
    ranks = sorted((tmp_path / "runs" / "tiny").glob("rank*.json"))
    assert len(ranks) == 2
    assert json.loads(ranks[0].read_text())["OMP_NUM_THREADS"] == "3"


FROM_THE_BEGINNING = "megatron-sts: the same command starts from the beginning: there is no checkpoint yet"


def test_failing_rank_is_named(run, config: Path) -> None:
    result = run("train", config, "--nproc", "2", STAND_IN=FAILURE)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-2:] == [
        "megatron-sts: error: rank 1 (exit code 1): RuntimeError: layer 3 is broken second line",
        FROM_THE_BEGINNING,
    ]
    assert "[rank 1] Traceback" in result.stderr
    assert "torch" not in result.stderr


def test_killed_rank_is_the_cause(run, config: Path) -> None:
    result = run("train", config, "--nproc", "2", STAND_IN=KILLED)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [
        "megatron-sts: error: rank 1 was killed by SIGKILL (out of memory?)",
        FROM_THE_BEGINNING,
    ]


def test_cause_comes_before_its_consequences() -> None:
    def failure(
        exitcode: int, seen: float, time: float | None = None, *, lost: bool = False, ended: bool = False
    ) -> Failure:
        words = (
            {}
            if time is None
            else {"message": "RuntimeError: x", "time": time, "is_lost": lost, "is_first": True, "status": 1}
        )
        return Failure(0, exitcode, seen, words, ended)

    killed, first, later = failure(-9, 12), failure(1, 10.8, 10.4), failure(1, 10.8, 10.7)
    lost, telling, ended = failure(1, 9, 9, lost=True), failure(-9, 12, 10.5, ended=True), failure(-9, 8, ended=True)
    order = [killed, first, telling, later, lost, ended]
    assert sorted(reversed(order), key=lambda one: one.order) == order
    assert telling.describe() == "rank 0 (exit code 1): RuntimeError: x"  # never by the signal that ended it


def test_users_mistake_is_one_line(run, config: Path) -> None:
    result = run("train", config, "--nproc", "2", STAND_IN=USER)
    assert result.returncode == 2
    assert result.stderr == (
        "megatron-sts: error: rank 1 (exit code 2): data.path=gone: no such file; correct data.path\n"
    )


def test_rank_of_srun(run, config: Path, tmp_path: Path) -> None:
    slurm = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2", "MASTER_ADDR": "node1"}
    result = run("train", config, "--run-dir", "out", **slurm)
    assert result.returncode == 0, result.stderr
    seen = json.loads((tmp_path / "out" / "rank1.json").read_text())
    assert (seen["RANK"], seen["LOCAL_RANK"], seen["WORLD_SIZE"], seen["world_size"]) == ("1", "1", "2", 2)
    result = run("train", config, STAND_IN=USER, **slurm)
    assert result.returncode == 2
    assert result.stderr == "megatron-sts: error: rank 1: data.path=gone: no such file; correct data.path\n"


def test_a_wrong_config_on_a_rank_is_left_to_its_launcher(run, config: Path, tmp_path: Path) -> None:
    """What torchrun's summary ends with, and what the batch script reads."""
    torchrun = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json"),
    }
    result = run("train", config, "stages.only.steps=-1", "--run-dir", "out", **torchrun)
    line = "stages.only.steps=-1: it should be greater than 0"
    assert (result.returncode, result.stderr) == (2, f"megatron-sts: error: rank 0: {line}\n")
    words = json.loads((tmp_path / "error.json").read_text())
    assert words["message"] == line and words["status"] == 2
    found = outcome.read(tmp_path / "out")
    assert found and (found.outcome, found.cause, found.requeue) == ("failed", f"rank 0: {line}", False)


def test_rank_from() -> None:
    assert rank_from({}) is None
    assert rank_from({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}) is None  # a batch script, not a task
    tasks = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "MASTER_ADDR": "node1"}
    assert rank_from(tasks) == Rank(1, 0, 2)
    assert rank_from(tasks | {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Rank(3, 1, 8)


def test_what_something_left_behind_makes_no_rank(run, config: Path) -> None:
    result = run("train", config, "--run-dir", "out", RANK="0", WORLD_SIZE="1")
    line = "RANK=0: with WORLD_SIZE it makes this process a rank, but there is no MASTER_ADDR; set that too, as torchrun does, "
    assert result.returncode == 2 and result.stderr.startswith(f"megatron-sts: error: {line}")
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE=two: not a number"):
        rank_from({"RANK": "0", "WORLD_SIZE": "two", "MASTER_ADDR": "node1"})


def test_default_run_dir(tmp_path: Path) -> None:
    assert default_run_dir(Path("examples/tiny/config.yaml")) == Path("runs/tiny")
    assert default_run_dir(Path("other/dense.yaml")) == Path("runs/dense")
    assert default_run_dir(tmp_path) == Path("runs") / tmp_path.name
