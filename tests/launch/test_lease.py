"""A run folder has one holder on all machines: who is refused, who may follow at once, who waits, and who stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sts.config.errors import ConfigError
from megatron_sts.launch import heartbeat, lease
from megatron_sts.launch.lease import Holder, Lease, LeaseLostError

ELSEWHERE = "another-boot pid:[1]"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "INTERVAL_S", 0.2)


def held(run_dir: Path, **changes: object) -> Holder:
    """A holder on another machine, with its file written."""
    mine = lease._myself({"SLURM_JOB_ID": "7"})
    there = replace(mine, token="there", host="nodeb", machine=ELSEWHERE, **changes)  # type: ignore[arg-type]
    lease._write(run_dir, there)
    return there


def moving(run_dir: Path, holder: Holder) -> Callable[[], None]:
    """Its counter rises; what is returned ends that."""
    end = threading.Event()

    def rise() -> None:
        counter = holder.counter
        while not end.wait(0.1):
            counter += 1
            lease._write(run_dir, replace(holder, counter=counter))

    thread = threading.Thread(target=rise)
    thread.start()
    return lambda: (end.set(), thread.join())[0]


def test_a_holder_elsewhere_that_lives_is_kept(tmp_path: Path) -> None:
    stop = moving(tmp_path, held(tmp_path))
    try:
        why = rf"^--run-dir={tmp_path}: another run is writing it \(nodeb, pid {os.getpid()}, job 7\); .*\.lease\)$"
        with pytest.raises(ConfigError, match=why):
            lease.take(tmp_path, {"SLURM_JOB_ID": "8"})
    finally:
        stop()


def test_one_that_stands_still_is_followed_after_three_intervals(tmp_path: Path) -> None:
    held(tmp_path)
    started = time.monotonic()
    taken = lease.take(tmp_path, {"SLURM_JOB_ID": "8"})
    assert 0.6 <= time.monotonic() - started < 2
    taken.check()


@pytest.mark.parametrize(("job", "restart", "is_refused"), [("7", "2", False), ("7", "1", True), ("8", "2", True)])
def test_a_later_start_of_the_same_job_takes_over_at_once(
    tmp_path: Path, job: str, restart: str, is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = moving(tmp_path, held(tmp_path, restart=1))
    try:
        environment = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restart}
        if is_refused:
            with pytest.raises(ConfigError):
                lease.take(tmp_path, environment)
        else:
            monkeypatch.setattr(lease, "_moves", None)  # nobody waits
            lease.take(tmp_path, environment)
    finally:
        stop()


def test_on_this_machine_the_kernels_lock_has_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = moving(tmp_path, held(tmp_path))
    stop()
    before = json.loads((tmp_path / lease.LEASE).read_text()) | {"machine": heartbeat.machine()}
    (tmp_path / lease.LEASE).write_text(json.dumps(before))
    monkeypatch.setattr(lease, "_moves", None)  # nobody waits
    lease.take(tmp_path, {}).check()
    found = lease.read(tmp_path)
    assert found is not None and found.token != before["token"]


def test_where_the_kernel_keeps_no_lock_a_holder_that_lives_is_kept(tmp_path: Path) -> None:
    """As on some parallel file systems; until it ends, though nobody waits for it."""
    code = "import sys\nfrom pathlib import Path\nfrom megatron_sts.launch import lease\nlease.take(Path(sys.argv[1]), {})\ninput()"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while lease.read(tmp_path) is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        with pytest.raises(ConfigError, match=rf", pid {holder.pid}\); "):
            lease.take(tmp_path, {})
        holder.kill()
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        assert not lease.may_be_held(tmp_path)
        lease.take(tmp_path, {}).check()
    finally:
        holder.kill()
        holder.wait()


def test_a_holder_that_lost_the_folder_stops_and_writes_nothing(tmp_path: Path) -> None:
    mine = lease.take(tmp_path, {})
    time.sleep(0.25)
    mine.renew()
    assert lease.read(tmp_path) is not None and lease.read(tmp_path).counter == 1  # type: ignore[union-attr]
    mine.check()
    other = held(tmp_path)
    time.sleep(0.25)
    with pytest.raises(LeaseLostError):
        mine.renew()
    assert lease.read(tmp_path) == other
    with pytest.raises(LeaseLostError, match=rf"another start \(nodeb, pid {os.getpid()}, job 7\) has taken it"):
        mine.check()
    mine.release()
    assert lease.read(tmp_path) == other and not lease.is_held_by(tmp_path, mine.token)


def test_released_it_is_free(tmp_path: Path) -> None:
    mine = lease.take(tmp_path, {})
    assert lease.may_be_held(tmp_path) and isinstance(mine, Lease)
    mine.release()
    assert not lease.may_be_held(tmp_path) and lease.read(tmp_path) is None


def test_damaged_is_as_none(tmp_path: Path) -> None:
    (tmp_path / lease.LEASE).write_text('{"token": "x"')
    lease.take(tmp_path, {}).check()
