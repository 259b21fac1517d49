"""Jobs on a real SLURM of three nodes on this machine (``cluster.sh``): what reaches the ranks, and runs that are stopped, killed and gone on with.

The first start a stand-in that only writes down what it was started with; the runs at the end are real.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from megatron_sts.cli import main
from tests.slurm.jobs import (
    QUICKSTART,
    STAND_IN,
    end_of,
    events,
    launch,
    local_run,
    log_of,
    numbers,
    state,
    submitted,
    tasks,
    tell,
    wait_for,
    wait_for_step,
)
from tests.train import stagehand
from tools import bench_throughput, slurm_acceptance

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("cluster.sh")
SHORT = [
    "stages.alignment.steps=2",
    "stages.*.optimizer.warmup_steps=1",
    "stages.finetune.steps=24",
    "evaluation.num_questions=0",
    "logging.tensorboard=false",
]
ONE_THREAD = ["--env", "OMP_NUM_THREADS=1"]
NASTY = [
    "model.language.init= it's $HOME `id` $(touch /tmp/sts-touched) ; echo \\ *?~!",
    'model.vision.init="two\n#SBATCH --nodes=9\r\nlines\t{of} é"',
    "seed= 7",
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """``cluster("kill", "node2")``; the job commands find it through SLURM_CONF."""
    if os.environ.get("STS_NO_SLURM") or subprocess.run(["bash", SCRIPT, "install"], capture_output=True).returncode:
        pytest.skip("no SLURM here, and it cannot be installed: bash tests/slurm/cluster.sh install says why")
    if os.geteuid() != 0:
        pytest.skip("bringing up a SLURM needs root")
    base = tmp_path_factory.mktemp("cluster")

    def act(action: str, *words: str) -> str:
        environment = os.environ | {"STS_CLUSTER_OWNER": str(os.getpid())}
        command = ["bash", str(SCRIPT), action, str(base), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(base / "etc/slurm.conf")
    try:
        act("up")
        yield act
    finally:
        act("down")
        del os.environ["SLURM_CONF"]
        if before is not None:
            os.environ["SLURM_CONF"] = before


@pytest.fixture
def stand_in(tmp_path: Path) -> str:
    path = tmp_path / "python"
    path.write_text(STAND_IN.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("launcher", ["torchrun", "srun", "by hand"])
def test_words_arrive_as_written(cluster, stand_in: str, tmp_path: Path, capsys, launcher: str) -> None:
    run = tmp_path / "a 'run' of \"mine\" 100%j"
    overrides = [
        *NASTY,
        "parallel.data_parallel_size=null",
        "parallel.pipeline_model_parallel_size=2",
    ]  # for four ranks
    if launcher == "by hand":
        environment = os.environ | {
            "STS_PYTHON": stand_in,
            "STS_RUN_DIR": str(run),
            "NPROC_PER_NODE": "2",
            "STS_ROOT": str(tmp_path),
        }
        options = ["--parsable", "--nodes=2", "--cpus-per-task=4", f"--output={tmp_path}/log"]
        command = ["sbatch", *options, str(ROOT / "launch/slurm/train.sbatch"), "config.yaml", *overrides]
        job = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
        config = "config.yaml"
    else:
        flag = ["--srun-ranks"] if launcher == "srun" else ["--follow"]
        words = ["--run-dir", str(run), "--python", stand_in, "--env", "NCCL_IB_HCA=a b", "--cpus-per-rank", "2", *flag]
        launch(*words, *overrides, gpus=2, ranks=2)
        [job] = submitted(capsys)
        config = str(run / "launch/001/config.yaml")
    assert end_of(job) == "COMPLETED"
    found = tasks(run, job)
    assert len(found) == (4 if launcher == "srun" else 2)
    for words, environment in found:
        assert words == ["-m", "megatron_sts.launch.slurm_task", "train", config, *overrides, "--run-dir", str(run)]
        assert (
            environment["STS_CPUS_PER_TASK"]
            == environment["SLURM_CPUS_PER_TASK"]
            == ("2" if launcher == "srun" else "4")
        )
        assert environment["OMP_NUM_THREADS"] in ("1", "2")  # set where the tests run, or the rank's share
        assert environment["STS_MEETING_HOSTS"].split()[0] == "node1"
        assert 20000 <= int(environment["MASTER_PORT"]) < 32768
        assert environment["STS_LOG_DIR"] == f"{run}/logs/{job}.0"
    assert not Path("/tmp/sts-touched").exists()
    if launcher != "by hand":
        assert {environment["NCCL_IB_HCA"] for _, environment in found} == {"a b"}
        assert f"job {job}, start 1, 2 nodes x 2 ranks ({launcher})" in (run / f"launch/001/job-{job}.out").read_text()


def test_a_job_that_can_never_start_is_refused(cluster, tmp_path: Path, capsys) -> None:
    place = ["--nodes", "4", "--gpus-per-node", "0", "--ranks-per-node", "1", "--run-dir", str(tmp_path / "run")]
    place += ["parallel.pipeline_model_parallel_size=2"]  # for four ranks
    assert main(["launch", "slurm", QUICKSTART, *place]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "SLURM could not start this job" in told and "not available" in told
    assert main(["launch", "slurm", QUICKSTART, *place, "--untested", "--partition", "none"]) == 2
    assert "sbatch refused --partition (invalid partition specified: none" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_usr1_puts_the_job_back_into_the_queue(cluster, stand_in: str, tmp_path: Path, capsys, monkeypatch) -> None:
    """Of an array the task that it is sent to, also the one whose number among jobs is the whole array's."""
    run = tmp_path / "run-{array}"
    launch("--array", "0-1", "--run-dir", str(run), "--python", stand_in, "--env", "PLAY=save,true,0")
    [job] = submitted(capsys)
    runs = [tmp_path / f"run-{number}" for number in (0, 1)]
    wait_for(lambda: all((run / "ready").exists() for run in runs), "the stand-ins do not start")
    told, other = sorted(runs, key=lambda run: not list(run.glob(f"task-{job}-*")))
    number, others = f"{job}_{told.name[-1]}", f"{job}_{other.name[-1]}"
    tell("--batch", "--signal=USR1", number)
    assert end_of(number) == "COMPLETED" and state(others) == "RUNNING"
    log = (tmp_path / f"launch/001/job-{number}.out").read_text()
    assert "the time limit is near: saving" in log and "ended as 'stopped'" in log and "start 2," in log
    assert tasks(told, job)[0][1]["SLURM_RESTART_COUNT"] == "1"
    assert "start 2," not in (tmp_path / f"launch/001/job-{others}.out").read_text()
    tell("--signal=KILL", f"{others}.0")  # the step, at once: nodes that wait for a cancelled job keep others waiting


def test_a_failure_ends_the_chain(cluster, stand_in: str, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    launch("--run-dir", str(run), "--python", stand_in, "--chain", "2", "--env", "PLAY=failed,false,3")
    first, second = submitted(capsys)
    assert (end_of(first), end_of(second)) == ("FAILED", "FAILED")
    assert len(tasks(run, first)) == 2 and not tasks(run, second)
    assert (
        "the job before this one ended as 'failed': the chain ends here"
        in (run / f"launch/001/job-{second}.out").read_text()
    )
    # A link whose time was up hands over to the next one; after the last step there is nothing left to start.
    run = tmp_path / "other"
    launch("--run-dir", str(run), "--python", stand_in, "--chain", "3", "--env", "PLAY=chain,true,0")
    first, second, third = submitted(capsys)
    assert {end_of(job) for job in (first, second, third)} == {"COMPLETED"}
    assert len(tasks(run, first)) == len(tasks(run, second)) == 2 and not tasks(run, third)
    assert "has done the whole run: nothing is left to do" in (run / f"launch/001/job-{third}.out").read_text()
    # The last one does not promise a next one.
    run = tmp_path / "third"
    launch("--run-dir", str(run), "--python", stand_in, "--chain", "2", "--env", "PLAY=stopped,true,0")
    first, last = submitted(capsys)
    assert (end_of(first), end_of(last)) == ("COMPLETED", "COMPLETED")
    told = [(run / f"launch/001/job-{job}.out").read_text().splitlines()[-1] for job in (first, last)]
    assert told[0] == "megatron-sts: the next job of the chain goes on"
    assert told[1].startswith(
        "megatron-sts: this was the last job of the chain; to go on, submit again with the same run"
    )


def test_a_job_that_fails_again_and_again_is_not_requeued_for_ever(
    cluster, stand_in: str, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints/0-only-0000010").mkdir(parents=True)
    launch("--run-dir", str(run), "--python", stand_in, "--env", "PLAY=failed,true,3", "--env", "STS_MAX_FAILURES=2")
    [job] = submitted(capsys)
    assert end_of(job) == "FAILED"
    log = (run / f"launch/001/job-{job}.out").read_text()
    assert "start 2," in log and "start 3," not in log
    assert "failed 2 times with the same newest checkpoint (0-only-0000010)" in log
    assert log.endswith(f"to go on, submit again with the same run folder: {run} (why it ended: outcome.json there)\n")


def homes(run: Path) -> list[str]:
    """Where each start was."""
    return re.findall(r"start \d+, .* on (\S+), ", log_of(run))


def excluded(job: str) -> str:
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True).stdout
    return re.search(r" ExcNodeList=(\S*)", shown)[1]  # type: ignore[index]


def test_the_next_start_does_without_a_node_that_was_lost(cluster, stand_in: str, tmp_path: Path, capsys) -> None:
    """SLURM knows nothing against it. What the user excludes stays excluded, and at a time limit all is forgiven."""
    python, jobs = ["--python", stand_in], dict[str, str]()
    for name, nodes, exclude, play in [
        ("hangs", 2, [], "hangs,true,0"),
        ("excluded", 1, ["--exclude", "node3"], "lost,true,0"),
        ("no other", 1, ["--exclude", "node2,node3"], "lost,true,0"),
    ]:
        words = ["--run-dir", str(tmp_path / name), *python, *exclude, "--env", f"PLAY={play}", "--env", "STS_MEET_S=3"]
        launch(*words, "parallel.data_parallel_size=null", nodes=nodes)
        [jobs[name]] = submitted(capsys)
    assert {end_of(job) for job in jobs.values()} == {"COMPLETED"}
    logs = {name: log_of(tmp_path / name) for name in jobs}
    hung = [
        name
        for _, name in re.findall(r"error: (node 1 of 2 \((node\d)\) did not come within STS_MEET_S=3)", logs["hangs"])
    ]
    assert len(hung) == 1 and f"lost {hung[0]}: the next start gets other nodes" in logs["hangs"]
    assert excluded(jobs["hangs"]) == hung[0]
    [first, second, _] = homes(tmp_path / "excluded")
    assert {first, second} == {"node1", "node2"} and excluded(jobs["excluded"]) == "node3"
    assert homes(tmp_path / "no other") == ["node1"] * 3 and excluded(jobs["no other"]) == "node[2-3]"
    assert "lost node1; there are not enough other nodes of this kind" in logs["no other"]


def test_numbers_of_an_array_are_filled_in(cluster, stand_in: str, tmp_path: Path, capsys) -> None:
    words = ["--array", "3,5", "--run-dir", str(tmp_path / "runs/{array}"), "--python", stand_in, "seed={array}"]
    launch(*words)
    [job] = submitted(capsys)
    wait_for(lambda: all((tmp_path / f"runs/{number}/outcome.json").exists() for number in (3, 5)), "no array")
    wait_for(lambda: set(state(job).split()) == {"COMPLETED"}, "the array does not end")
    for number in (3, 5):
        [(words, _), _] = [json.loads(path.read_text()) for path in (tmp_path / f"runs/{number}").glob("task-*")]
        assert f"seed={number}" in words and words[-1] == str(tmp_path / f"runs/{number}")


def test_a_signal_to_the_batch_shell_reaches_a_sweep(cluster, tmp_path: Path) -> None:
    """As megatron_sts/config/README.md starts one; its run saves."""
    written = stagehand.config(evaluation={"num_questions": 0}, checkpoint={}) | {"logging": {"tensorboard": False}}
    written["stages"] = [written["stages"][1] | {"steps": 100_000}]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"config": "config.yaml", "seeds": [1]}))
    out = tmp_path / "out"
    wrapped = f"exec {sys.executable} -m megatron_sts sweep {tmp_path}/sweep.yaml --out {out}"
    command = ["sbatch", "--parsable", "--signal=B:USR1@180", f"--output={tmp_path}/log", "--wrap", wrapped]
    job = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True
    ).stdout.strip()
    wait_for(lambda: ("finetune", 1) in numbers(out / "seed=1"), "no step")
    tell("--batch", "--signal=USR1", job)
    wait_for(
        lambda: (tmp_path / "log").read_text().endswith("stopped by SIGUSR1; the same command goes on\n"), "not stopped"
    )
    assert json.loads((out / "seed=1" / "outcome.json").read_text())["outcome"] == "stopped"


@pytest.mark.slow
def test_what_a_rank_refuses_is_a_line_of_each_node(
    cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing of torchrun's or of its store's, and the status of a wrong config."""
    run = tmp_path / "run"
    launch("--run-dir", str(run), *ONE_THREAD, *SHORT, "model.language.init=/nowhere")
    [job] = submitted(capsys)
    assert end_of(job) == "FAILED"
    told = [line for line in log_of(run).splitlines() if not line.startswith(("srun: ", "slurmstepd"))]
    refused = r"megatron-sts: error: node(\d): rank \d(?: \(exit code 2\))?: model\.language\.init=/nowhere: no such file or folder; .*"
    assert told[0].startswith("megatron-sts: job ") and told[-2].startswith("megatron-sts: ended as 'failed' (srun: ")
    assert told[-1].startswith("megatron-sts: not requeued; to go on, submit again")
    assert 1 <= len(told[1:-2]) <= 2 and all(re.fullmatch(refused, line) for line in told[1:-2]), told
    assert "rank" in json.loads((run / "outcome.json").read_text())["cause"]


@pytest.mark.slow
def test_acceptance(cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page for owners of clusters: ranks of srun, then torchrun with USR1 and scancel, all with the numbers of local ranks."""
    out = tmp_path / "out"
    assert slurm_acceptance.main(["--gpus-per-node", "0", "--out", str(out), *ONE_THREAD]) == 0, capsys.readouterr().out
    page = (out / "acceptance.md").read_text()
    print(page)
    assert "5 checks, 0 failed" in page and "62 of 62 losses equal bit for bit" in page and "not requeued" in page
    expected = local_run(tmp_path / "local", str(ROOT / "launch/slurm/acceptance.yaml"))
    assert numbers(out / "reference") == numbers(out / "interrupted") == expected
    assert json.loads((out / "interrupted/outcome.json").read_text())["outcome"] == "done"
    assert [line["signal"] for line in events(out / "interrupted", "stop")] == ["SIGUSR1", "SIGTERM"]


@pytest.mark.slow
def test_weak_scaling(cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """Two nodes have twice the samples of one, and a table beside it."""
    config, out = tmp_path / "config.yaml", tmp_path / "runs"
    config.write_text(yaml.safe_dump(stagehand.config()))
    words = ["bench", "submit", str(config), "seed=2", "--nodes", "2", "1", "--scaling", "weak", "--steps", "8"]
    place = ["--gpus-per-node", "0", "--ranks-per-node", "1", *ONE_THREAD]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(out), "--options", *place])
    bench_throughput.main()
    runs = [out / "weak-0001", out / "weak-0002"]
    wait_for(lambda: all((run / "outcome.json").exists() for run in runs), f"they do not end: {log_of(runs[0])}")
    monkeypatch.setattr(sys, "argv", ["bench", "read", *map(str, runs), "--json"])
    capsys.readouterr()
    bench_throughput.main()
    found = {(each["stage"], each["num_ranks"]): each for each in json.loads(capsys.readouterr().out)["stages"]}
    assert found.keys() == {(stage, ranks) for stage in ("alignment", "finetune") for ranks in (1, 2)}
    for (_, ranks), each in found.items():
        assert each["global_batch_size"] == 8 * ranks and each["rates"]["tokens_per_s"]["median"] > 0
        assert (each["efficiency"] == 1) == (ranks == 1)


@pytest.mark.slow
def test_a_dead_node(cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last test: the cluster has two nodes from then on."""
    run = tmp_path / "a run"
    launch("--run-dir", str(run), "--cpus-per-rank", "4", *ONE_THREAD, "checkpoint.interval_steps=8", *SHORT)
    [job] = submitted(capsys)
    wait_for_step(run, 9)  # a checkpoint was saved at 8
    cluster("kill", "node2")
    died = time.monotonic()
    wait_for(lambda: "start 2," in log_of(run), f"not requeued: {log_of(run)}")
    requeued = time.monotonic()
    assert end_of(job) == "COMPLETED", log_of(run)
    [resumed] = events(run, "resume")
    assert resumed["step"] >= 8 and numbers(run) == local_run(tmp_path / "local", QUICKSTART, *SHORT)
    text = log_of(run)
    assert "Traceback" not in text.split("start 2,")[1]
    assert ("of the 4 CPUs that were asked for it" in text) == (len(os.sched_getaffinity(0)) < 4)
    assert sorted(path.name for path in (run / f"logs/{job}.1").iterdir()) == ["rank-00000.log", "rank-00001.log"]
    print(f"from a dead node to the next start: {requeued - died:.1f} s")
