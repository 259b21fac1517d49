"""Who keeps others waiting: gone, stopped, silent elsewhere or busy; and ranks that only wait are not blamed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_sts.launch import heartbeat, missing, trail
from megatron_sts.launch.heartbeat import Beat, Heartbeat
from megatron_sts.launch.missing import State
from megatron_sts.launch.trail import Mark


def beat(rank: int, **changes: object) -> Beat:
    """Of this very process, which runs."""
    mark = Mark(time.time() - 5, "finetune", 7, "backward", 2)
    pid = os.getpid()
    found = Beat(
        rank,
        "nodea",
        heartbeat.machine(),
        pid,
        heartbeat.start_ticks(pid),
        3,
        0.2,
        time.time(),
        mark,
        "train/step.py:9 (x)",
        True,
    )
    return replace(found, **changes)  # type: ignore[arg-type]


def write(folder: Path, *beats: Beat) -> None:
    for each in beats:
        text = json.dumps(asdict(each)).ljust(heartbeat.LENGTH) + "\n"
        file = os.open(folder / f"{each.rank}.json", os.O_CREAT | os.O_WRONLY)  # as a rank does it
        os.write(file, text.encode())
        os.close(file)


@pytest.fixture
def child():
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


def of(process: subprocess.Popen[bytes], rank: int) -> Beat:
    return beat(rank, pid=process.pid, started=heartbeat.start_ticks(process.pid))


def test_all_wait(tmp_path: Path) -> None:
    write(tmp_path, beat(0), beat(1), beat(2))
    assert missing.who(tmp_path, 3, 0) is None
    place = "is in stage finetune, step 7, backward pass of micro-batch 2, at train/step.py:9 (x)"
    assert missing.positions(tmp_path, [0, 1]) == f"{beat(0).name} {place}; {beat(1).name} {place}"


def test_a_stopped_process_comes_before_a_busy_one(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    write(tmp_path, beat(0), beat(1, is_waiting=False), of(child, 2))
    said, state, _ = missing.who(tmp_path, 3, 0)  # type: ignore[misc]
    assert state == State.BUSY
    assert (
        said.startswith("rank 1 (nodea, pid ")
        and " did not come: for 5 s it has been in stage finetune, step 7, backward" in said
    )
    os.kill(child.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    said, state, _ = missing.who(tmp_path, 3, 0)  # type: ignore[misc]
    assert state == State.STOPPED
    assert said.startswith(f"rank 2 (nodea, pid {child.pid}) did not answer for ") and "is stopped (SIGSTOP?)" in said


def test_a_process_that_is_gone_or_is_another_one(tmp_path: Path, child: subprocess.Popen[bytes]) -> None:
    write(tmp_path, beat(0), beat(1, started=1), replace(of(child, 2), is_waiting=False))
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie: it is still to be waited for
    said, state, _ = missing.who(tmp_path, 3, 0)  # type: ignore[misc]
    assert state == State.GONE and said.startswith("rank 1 (nodea, ") and said.endswith("; so did rank 2")


def test_on_another_machine_only_the_number_counts(tmp_path: Path) -> None:
    far = {
        "machine": "another",
        "host": "nodeb",
        "pid": 1,
        "interval_s": 1.0,
        "time": time.time() + 3600,
    }  # its clock is an hour ahead
    write(tmp_path, beat(0), beat(1, **far), beat(2, **far), beat(3, **far))
    end = threading.Event()

    def live() -> None:
        number = 3
        while not end.wait(0.02):
            number += 1
            write(tmp_path, beat(1, **far, number=number), beat(3, **far, number=number))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        said, state, nodes = missing.who(tmp_path, 4, 0)  # type: ignore[misc]
    finally:
        end.set()
        thread.join()
    assert state == State.SILENT and said.startswith("rank 2 (nodeb, pid 1) did not answer for ")
    assert nodes == ("nodeb",)


def test_a_rank_without_a_sign(tmp_path: Path) -> None:
    write(tmp_path, beat(0))
    assert missing.who(tmp_path, 2, 0) == ("rank 1 did not answer, and never said where it is", State.SILENT, ())


def test_of_ranks_that_lost_another_one_tells(tmp_path: Path) -> None:
    assert [heartbeat.may_tell(tmp_path) for _ in range(3)] == [True, False, False]
    assert heartbeat.notice(tmp_path) is None
    assert [heartbeat.leave_notice(tmp_path, rank, f"cause {rank}") for rank in (1, 0)] == [True, False]
    assert heartbeat.notice(tmp_path) == "cause 1"


def test_where_no_notice_can_be_left_everybody_speaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a full disk, or another start that took the folder, would end a run of srun without a word."""
    assert heartbeat.leave_notice(tmp_path / "gone", 0, "cause")
    monkeypatch.setattr(heartbeat, "NOTICE", "full")
    (tmp_path / ".full.1").symlink_to("/dev/full")
    assert heartbeat.leave_notice(tmp_path, 1, "cause") and heartbeat.leave_notice(tmp_path, 0, "cause")
    assert not heartbeat.leave_notice(tmp_path, 1, "cause")  # rank 0's is there


def test_a_busy_ranks_time_is_by_its_own_clock(tmp_path: Path) -> None:
    ahead = beat(1, is_waiting=False, time=time.time() + 3600)
    write(tmp_path, beat(0), replace(ahead, mark=replace(ahead.mark, time=ahead.time - 7)))
    said, *_ = missing.who(tmp_path, 2, 0)  # type: ignore[misc]
    assert " did not come: for 7 s it has been in " in said


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, bool]]:
    """What is seen of a main thread with a function of each of these files on its stack, outermost first."""

    def look(frame: object) -> tuple[str, bool]:
        monkeypatch.setattr(sys, "_current_frames", lambda: {threading.main_thread().ident: frame})
        return trail.where()

    def on_stack(*files: str) -> tuple[str, bool]:
        call, space = "found = look(sys._getframe())", {"look": look, "sys": sys}
        for number, file in enumerate(reversed(files)):
            exec(compile(f"def f{number}():\n    global found\n    {call}", file, "exec"), space)
            call = f"f{number}()"
        exec(call, space)
        found: tuple[str, bool] = space["found"]
        return found

    return on_stack


# In a checkout that is called as the package is.
PACKAGE, TORCH, CORE = trail.ROOT, "/x/megatron_sts/.venv/lib/torch/distributed", "/x/lib/megatron/core"


def test_reading_a_checkpoint_is_no_wait_for_others(seen: Callable[..., tuple[str, bool]]) -> None:
    """A rank whose disk hangs is to be named, though torch reads in torch/distributed/."""
    here = f"{PACKAGE}/mcore/checkpoint.py"
    assert not seen(here, f"{TORCH}/checkpoint/filesystem.py")[1]
    assert seen(here, f"{TORCH}/checkpoint/utils.py", f"{TORCH}/c10d_logger.py", f"{TORCH}/distributed_c10d.py")[1]


def test_timers_hide_neither_a_wait_nor_where_it_is(seen: Callable[..., tuple[str, bool]]) -> None:
    """Overlapped transfers, of which the last function in Python is the timer's; collectives; and what waits for nobody."""
    run, timer = f"{PACKAGE}/mcore/pipeline.py", f"{PACKAGE}/mcore/collectives.py"
    assert seen(run, f"{CORE}/pipeline_parallel/schedules.py", timer) == ("mcore/pipeline.py:3 (f2)", True)
    gather = (
        f"{PACKAGE}/mcore/attention.py",
        f"{CORE}/tensor_parallel/mappings.py",
        timer,
        f"{TORCH}/distributed_c10d.py",
    )
    assert seen(run, *gather) == ("mcore/attention.py:3 (f3)", True)
    backward = (
        f"{CORE}/pipeline_parallel/schedules.py",
        f"{PACKAGE}/runtime/clock.py",
        f"{CORE}/pipeline_parallel/schedules.py",
    )
    assert seen(run, *backward) == ("mcore/pipeline.py:3 (f3)", False)


def test_a_beat_says_where_the_process_is(tmp_path: Path) -> None:
    trail.at("align", 3)
    trail.enter("forward", 1)
    heart = Heartbeat(heartbeat.prepare(tmp_path, "start"), 5, 1)
    heart.interval_s = 0.05
    heart.start()
    deadline = time.monotonic() + 30
    while (found := heartbeat.find(tmp_path, 5, os.getpid())) is None or found.number <= 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    heart.close()
    assert found.mark.describe() == "stage align, step 3, forward pass of micro-batch 1"
    assert (found.machine, found.started) == (heartbeat.machine(), heartbeat.start_ticks("self"))
    assert heartbeat.find(tmp_path, 5, os.getpid() + 1) is None
    heart.dump()
    marks = json.loads((tmp_path / heartbeat.FOLDER / "start" / "5.trail.json").read_text())["marks"]
    assert marks[-1]["phase"] == "forward" and len(marks) <= trail.NUM_KEPT


def test_a_long_phase_is_no_long_wait(tmp_path: Path) -> None:
    """Building a model may take longer than any collective may: only what beats saw of a wait counts."""
    heart = Heartbeat(heartbeat.prepare(tmp_path, "start"), 0, 2)
    trail._marks.append(Mark(time.time() - 1000, None, None, "start", None))
    beats = threading.Thread(target=heart.write)  # as ever: not the thread that it looks at
    beats.start()
    beats.join()
    time.sleep(0.06)
    assert heart.waiting_s == 0.0
    waiting = heart._seen
    assert waiting is not None and not waiting[2]
    heart._seen = (waiting[0], waiting[1], True)
    assert 0.05 < heart.waiting_s < 10


def test_a_mark_costs_a_few_microseconds() -> None:
    """A step has some ten marks and a second of beats; a thousandth of a step of 100 ms are 100 µs."""
    started = time.thread_time()
    for number in range(2000):
        trail.enter("forward", number)
    assert (time.thread_time() - started) / 2000 < 50e-6  # 1 µs on an idle machine
