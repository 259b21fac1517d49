"""Ranks made by fork, and fresh ones where fork is not safe: what they are given, how they end, what is left behind."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sts.launch import fork

SCRIPT = """
import json, multiprocessing, os, signal, sys, threading, time
from functools import partial
from megatron_sts.config.errors import ConfigError
from megatron_sts.launch import local

def work(folder):
    rank = int(os.environ["RANK"])
    told = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")}
    told |= {"pid": os.getpid(), "parent": os.getppid(), "leads": os.getpgid(0) == os.getpid(), "had": "graphlib" in sys.modules}
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(told, file)
    exec(WORK)

if __name__ == "__main__":
    folder, num_ranks = sys.argv[1], int(sys.argv[2])
    if THREAD:
        threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    local.GRACE_S = 2.0
    sys.exit(local.launch_local(partial(work, folder), num_ranks, ["graphlib"]))
"""


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """``launch(num_ranks, work, thread=False)``: a launcher whose ranks run the code ``work`` with ``rank`` and ``folder``."""

    def start(num_ranks: int, work: str = "", *, thread: bool = False) -> subprocess.Popen[str]:
        script = tmp_path / "script.py"
        script.write_text(f"WORK = {work!r}\nTHREAD = {thread}\n{SCRIPT}")
        environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        return subprocess.Popen(
            [sys.executable, str(script), str(tmp_path), str(num_ranks)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def told(folder: Path, num_ranks: int) -> list[dict]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(num_ranks)]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.mark.parametrize("thread", [False, True])
def test_ranks_know_their_place(launch, tmp_path: Path, thread: bool) -> None:
    """Forked ones have the modules; beside a thread they are fresh."""
    process = launch(2, thread=thread)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out, err) == (0, "", "")
    ranks = told(tmp_path, 2)
    assert [rank["RANK"] for rank in ranks] == [rank["LOCAL_RANK"] for rank in ranks] == ["0", "1"]
    assert all(rank["WORLD_SIZE"] == "2" and rank["leads"] and rank["parent"] == process.pid for rank in ranks)
    assert all(int(rank["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2) for rank in ranks)
    assert [rank["had"] for rank in ranks] == [not thread] * 2


def test_ranks_meet_and_the_store_outlives_rank_zero(launch) -> None:
    work = """
import torch.distributed as dist
dist.init_process_group("gloo")
box = [None, None]
dist.all_gather_object(box, rank)
assert box == [0, 1], box
if rank == 1:
    while os.path.exists(f"/proc/{json.load(open(f'{folder}/0.json'))['pid']}"):
        time.sleep(0.05)
    dist.distributed_c10d._get_default_store().set("late", "word")
"""
    process = launch(2, work)
    _, err = process.communicate(timeout=200)
    assert (process.returncode, err) == (0, "")


def test_a_failing_rank_ends_the_others(launch, tmp_path: Path) -> None:
    process = launch(2, "raise ConfigError('a=1: wrong; correct it') if rank == 1 else time.sleep(600)")
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out, err) == (
        2,
        "",
        "megatron-sts: error: rank 1 (exit code 2): a=1: wrong; correct it\n",
    )
    assert not any(is_running(rank["pid"]) for rank in told(tmp_path, 2))


def test_the_rank_that_raises_is_named_not_the_one_that_lost_it(launch) -> None:
    """Whichever ends first. What they do here has no heartbeat."""
    work = """
import torch.distributed as dist
dist.init_process_group("gloo")
dist.barrier()
if rank == 1:
    dist.destroy_process_group()
    time.sleep(0.1)
    raise RuntimeError("layer 3 is broken")
dist.barrier()
"""
    process = launch(2, work)
    _, err = process.communicate(timeout=200)
    ours = [line for line in err.splitlines() if line.startswith("megatron-sts")]
    assert process.returncode == 1
    assert ours == ["megatron-sts: error: rank 1 (exit code 1): RuntimeError: layer 3 is broken"]
    assert "[rank 0]" not in err


def test_a_rank_that_does_not_listen_is_killed(launch, tmp_path: Path) -> None:
    """With a helper in its group, which would stay."""
    work = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if rank == 1:
    while not os.path.exists(f"{folder}/helper"):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGKILL)
helper = os.fork()
if helper:
    open(f"{folder}/helper.part", "w").write(str(helper))
    os.rename(f"{folder}/helper.part", f"{folder}/helper")
time.sleep(600)
"""
    process = launch(2, work)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 1 and err == "megatron-sts: error: rank 1 was killed by SIGKILL (out of memory?)\n"
    assert not is_running(int((tmp_path / "helper").read_text()))
    assert not any(is_running(rank["pid"]) for rank in told(tmp_path, 2))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_ranks_end_with_the_launcher(launch, tmp_path: Path, number: signal.Signals) -> None:
    process = launch(2, "time.sleep(600)")
    wait_for(lambda: all((tmp_path / f"{rank}.json").exists() for rank in range(2)), "no ranks")
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    if number == signal.SIGKILL:
        assert (process.returncode, err) == (-9, "")
    else:
        assert (process.returncode, err) == (128 + number, f"megatron-sts: stopped by {number.name}\n")
    wait_for(lambda: not any(is_running(rank["pid"]) for rank in told(tmp_path, 2)), "a rank outlives its launcher")


def test_under_nohup_a_hangup_is_not_heard(launch, tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # which a child inherits
    try:
        process = launch(2, "time.sleep(600)")
    finally:
        signal.signal(signal.SIGHUP, before)
    try:
        wait_for(lambda: all((tmp_path / f"{rank}.json").exists() for rank in range(2)), "no ranks")
        process.send_signal(signal.SIGHUP)
        time.sleep(1)  # a hangup that is heard ends them at once
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()


def test_a_second_sigterm_does_not_cut_saving_short(launch, tmp_path: Path) -> None:
    """A job's end comes to every process, and to ranks' launcher once more from who started it."""
    work = """
def save(number, frame, folder=folder, rank=rank):
    open(f"{folder}/begun{rank}", "w").close()
    time.sleep(1)
    open(f"{folder}/saved{rank}", "w").close()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
open(f"{folder}/ready{rank}", "w").close()
time.sleep(600)
"""
    process = launch(2, work)
    try:
        wait_for(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)), "no ranks")
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: all((tmp_path / f"begun{rank}").exists() for rank in range(2)), "not told")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert all((tmp_path / f"saved{rank}").exists() for rank in range(2))


def test_a_stop_request_waits_for_the_ranks(launch, tmp_path: Path) -> None:
    """It may come before a rank is ready for it."""
    work = """
from megatron_sts.train.interrupt import StopRequest
time.sleep(1)
stop = StopRequest()
while not stop.received:
    time.sleep(0.02)
"""
    process = launch(2, work)
    wait_for(lambda: (tmp_path / "0.json").exists(), "no rank")
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (0, "")


def test_a_thread_forbids_fork() -> None:
    code = "from megatron_sts.launch import fork\nimport threading, time\nprint(fork.start_method())\n"
    code += "threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\nprint(fork.start_method())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["fork", "spawn"]


def test_imports_leave_the_garbage_collector_as_it_was() -> None:
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), fork.uncollected():
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()
