"""What srun starts on a node: where ranks meet, which CPUs they have, what they print, and what a SIGTERM means to them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_sts.launch import outcome, slurm_task
from tests import warm
from tests.cli.conftest import CONFIG

ADDRESSES = {"node7": "127.0.1.1", "10.0.0.7": "10.0.0.7", "node8": "10.0.0.8", "localhost": "127.0.0.1"}


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(host: str, *_: object, **__: object) -> list[tuple]:
        if host not in ADDRESSES:
            raise socket.gaierror
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ADDRESSES[host], 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.parametrize(
    ("candidates", "is_head", "host"),
    [
        (("node7", "10.0.0.7"), True, "node7"),
        (("node7", "10.0.0.7"), False, "10.0.0.7"),  # elsewhere it would be that node itself
        (("unknown", "node8"), False, "node8"),
        (("unknown", "localhost"), False, "localhost"),  # all on one machine
    ],
)
def test_where_ranks_meet(names: None, candidates: tuple[str, ...], is_head: bool, host: str) -> None:
    assert slurm_task.meeting_host(candidates, is_head=is_head) == host


def test_nobody_knows_the_first_node(names: None) -> None:
    with pytest.raises(SystemExit, match="known as a b, and none of these resolves here; set MASTER_ADDR"):
        slurm_task.meeting_host(["a", "b"], is_head=False)


def test_ranks_stand_in_slurms_order_of_nodes() -> None:
    addresses = [slurm_task.agent_address("zeus-node9", node) for node in range(1200)]
    assert sorted(addresses) == addresses


def test_too_few_cpus_are_told_with_numbers() -> None:
    environment = {"STS_CPUS_PER_TASK": "8", "SLURM_PROCID": "3", "SLURMD_NODENAME": "node2", "OMP_NUM_THREADS": "4"}
    assert slurm_task.unlike_asked(environment, 8) == ""
    told = slurm_task.unlike_asked(environment, 1)
    assert told.startswith(
        "task 3 on node2 may use 1 of the 8 CPUs that were asked for it; its ranks have 4 threads each"
    )


def test_a_killed_ranks_last_words_are_in_its_log(tmp_path: Path) -> None:
    code = """
import os, signal, sys
from megatron_sts.launch import rank_log
rank_log.keep(7)
os.system("echo from a child")
print("out", flush=True)
print("err", file=sys.stderr, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    environment = os.environ | {"STS_LOG_DIR": str(tmp_path / "new/logs")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == (tmp_path / "new/logs/rank-00007.log").read_text() == "from a child\nout\nerr\n"


@pytest.mark.parametrize("from_launcher", [True, False])
def test_who_sent_sigterm_decides(from_launcher: bool) -> None:
    """Its launcher ends a rank at once: a peer is gone. SLURM, or anybody else, tells it to save."""
    code = """
import os, signal, sys, time
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
os.environ["MEGATRON_STS_TERM_IS_HELD"] = "1"
rank = os.fork()
if not rank:
    from megatron_sts.launch import terminated
    terminated.watch(lambda: (print("told", flush=True), os._exit(3)))
    print(os.getpid(), flush=True)
    time.sleep(60)
if sys.argv[1] == "True":
    os.kill(rank, signal.SIGTERM)
print("ended", os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(from_launcher)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if not from_launcher:
        rank = int(process.stdout.readline())
        time.sleep(0.1)
        os.kill(rank, signal.SIGTERM)
    told = process.communicate(timeout=60)[0]
    assert "ended 143" in told and "told" not in told if from_launcher else told == "told\nended 3\n"


KEEP = """
import os, sys
from megatron_sts.launch import meeting, slurm_task
meeting.NOTICE_S = 0.5
command = [sys.executable, "-c", *sys.argv[1:]]
sys.exit(slurm_task.keep_ranks(command, "127.0.0.1", is_head=os.environ["SLURM_NODEID"] == "0"))
"""


# In one write: two ranks share a pipe, and an unbuffered print writes word by word.
SAYS_ITS_NUMBER = """
import os
os.write(1, f'rank {os.environ["RANK"]} of {os.environ["WORLD_SIZE"]}\\n'.encode())
"""
ENDS_ON_THE_FIRST_NODE = """
import os, sys, time
from pathlib import Path
from megatron_sts.launch import outcome
if os.environ["GROUP_RANK"] == "0":
    if os.environ["RANK"] == "0" and {is_told}:
        outcome.claim(Path(sys.argv[1]), "rank 0: why")
    sys.exit(1)
time.sleep(60)
"""


def tasks_of_nodes(
    run: Path, numbers: list[int], total: int, meet_s: int, rank: str = SAYS_ITS_NUMBER
) -> list[tuple[int, str]]:
    """Status and output of the tasks of those nodes, of ``total``, two ranks each that do what ``rank`` says."""
    job = {"SLURM_JOB_ID": "7", "SLURM_NNODES": str(total), "SLURM_JOB_NODELIST": f"node[1-{total}]"}
    job |= {"STS_RANKS_PER_NODE": "2", "MASTER_PORT": str(free_port()), "STS_MEET_S": str(meet_s)}
    tasks = [
        warm.Popen(
            [sys.executable, "-c", KEEP, rank, str(run)],
            env=os.environ | job | {"SLURM_NODEID": str(number), "SLURMD_NODENAME": f"node{number + 1}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in numbers
    ]
    said = [task.communicate(timeout=100)[0] for task in tasks]
    return [(task.returncode, text) for task, text in zip(tasks, said, strict=True)]


def test_nodes_meet_and_keep_their_ranks(tmp_path: Path) -> None:
    """torch's agents meet on the server on which the nodes have signed in, and ranks stand in the order of nodes."""
    first, second = (
        (status, sorted(line for line in said.splitlines() if "waiting for" not in line))
        for status, said in tasks_of_nodes(tmp_path, [0, 1], total=2, meet_s=60)
    )
    assert first == (0, ["rank 0 of 4", "rank 1 of 4"])
    assert second == (0, ["rank 2 of 4", "rank 3 of 4"])


def test_a_node_that_does_not_come(tmp_path: Path) -> None:
    """Of three, the last: the first says it, as the outcome does, which asks for another start."""
    first, second = tasks_of_nodes(tmp_path, [0, 1], total=3, meet_s=3)
    told = "node 2 of 3 (node3) did not come within STS_MEET_S=3; sinfo --Node --long says how SLURM finds them"
    *notices, error = first[1].splitlines()
    assert first[0] == second[0] == 1 and error == f"megatron-sts: error: {told}" and second[1] == ""
    assert notices[-1] == "megatron-sts: waiting for node 2 of 3 (node3)"
    found = outcome.read(tmp_path)
    assert found and (found.outcome, found.cause, found.requeue) == ("failed", told, True)
    assert found.nodes == ["node3"]


def test_the_first_node_does_not_come(tmp_path: Path) -> None:
    [(status, said)] = tasks_of_nodes(tmp_path, [1], total=2, meet_s=1)
    error = said.splitlines()[-1]
    assert status == 1 and "error: node 1 (node2): nobody answered at 127.0.0.1:" in error
    assert "for 1 s (Connection refused): node 0 did not start there" in error
    found = outcome.read(tmp_path)
    assert found and found.requeue and found.cause and error.endswith(found.cause)


@pytest.mark.parametrize("is_told", [True, False])
def test_the_first_node_ends_with_the_store(tmp_path: Path, is_told: bool) -> None:
    """Before the other's ranks have noticed: its task says so, or why, if the outcome does: the first one's may be dead."""
    rank = ENDS_ON_THE_FIRST_NODE.format(is_told=is_told)
    (status, said), (other_status, others) = tasks_of_nodes(tmp_path, [0, 1], total=2, meet_s=60, rank=rank)
    assert status == other_status == 1 and said.splitlines()[-1].startswith("megatron-sts: error: ")
    # Also torch's stack frames, here alone: this process has imported it before keep_ranks could set how much it says.
    errors = [line for line in others.splitlines() if line.startswith("megatron-sts")]
    found = outcome.read(tmp_path)
    assert found and found.cause
    if is_told:
        assert (found.cause, errors) == ("rank 0: why", ["megatron-sts: error: node2: rank 0: why"])
    else:
        assert "node2: torch's agents on the nodes lost each other at 127.0.0.1:" in found.cause and found.requeue
        assert errors == [f"megatron-sts: error: {found.cause}"]


HELD = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
os.environ["MEGATRON_STS_TERM_IS_HELD"] = "1"
from megatron_sts.cli import main
sys.exit(main())
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.mark.slow
def test_no_save_that_sigkill_would_cut_off(tmp_path: Path) -> None:
    """Saves take milliseconds here, but SLURM, it is said, kills sooner."""
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    config.write_text(CONFIG)
    overrides = [
        "stages.only.steps=4000",
        "checkpoint.interval_steps=3",
        "checkpoint.keep_last=1",
        "logging.tensorboard=false",
    ]
    environment = os.environ | {"STS_GRACE_S": "0.000001", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HELD, "train", str(config), *overrides, "--run-dir", str(run)]
    environment |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    with warm.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 200
        while not list(run.glob("checkpoints/0-*")):
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    assert "asked to stop: did not save" in said and "SIGKILL comes sooner); the same command goes on" in said
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if "event" in line]
    assert [event["is_saved"] for event in events if event["event"] == "stop"] == [False]
    outcome = json.loads((run / "outcome.json").read_text())
    assert (outcome["outcome"], outcome["requeue"], outcome["step"] % 3) == ("stopped", False, 0)
