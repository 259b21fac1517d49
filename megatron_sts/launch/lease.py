"""Who holds a run folder, on whatever machine: RUN_DIR/.lease says who, and a counter in it that the holder lives. Must not know torch.

On one machine the kernel's lock decides (``launch.exclusive``). Machines that share a file system may disagree on the time and
see each other's files late, so a reader compares no times: it waits, by its own clock, whether the counter rises.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from megatron_sts.config.errors import ConfigError
from megatron_sts.launch import heartbeat

LEASE = ".lease"
INTERVAL_S = 4.0
"""Between two rises of the counter."""
NUM_INTERVALS = 3
"""A holder whose counter stood still for so many is dead."""


class LeaseLostError(ValueError):
    """Another start has taken the run folder."""


@dataclass(frozen=True)
class Holder:
    """What the file says."""

    token: str
    """Of this start, among all."""
    host: str
    machine: str
    pid: int
    started: int
    """Of the process, in the kernel's ticks."""
    job: str | None
    """SLURM's job id."""
    restart: int
    """How often SLURM has started that job again."""
    interval_s: float
    counter: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.host}, pid {self.pid}" + (f", job {self.job}" if self.job else "")

    def is_on_kernel_of(self, other: Holder) -> bool:
        """Whether both see the same kernel, whose lock decides."""
        return self.machine.split()[0] == other.machine.split()[0]

    def follows(self, other: Holder) -> bool:
        """Whether this is a later start of the same job: SLURM has ended the one before."""
        return self.job is not None and self.job == other.job and self.restart > other.restart

    def is_alive_here(self) -> bool:
        """Whether it is a process of this machine that runs. One that ended stays as a zombie where nobody waits for it."""
        try:
            state, started = heartbeat.process(self.pid)
        except OSError:
            return False
        return self.machine == heartbeat.machine() and started == self.started and state not in heartbeat.ENDED


class Lease:
    """A run folder that is held by this process."""

    def __init__(self, run_dir: Path, holder: Holder) -> None:
        self._run_dir, self._holder = run_dir, holder
        self._renewed = time.monotonic()
        self._lost_to: Holder | None = None

    @property
    def token(self) -> str:
        """Of this start."""
        return self._holder.token

    def renew(self) -> None:
        """Raises the counter, when it is time.

        Raises:
            LeaseLostError: another start has the folder.
        """
        if time.monotonic() - self._renewed < self._holder.interval_s:
            return
        self.check()
        self._renewed = time.monotonic()
        self._holder = replace(self._holder, counter=self._holder.counter + 1)
        with suppress(OSError):  # a full disk: the folder is ours until somebody takes it
            _write(self._run_dir, self._holder)

    def check(self) -> None:
        """Before anything is put in its place.

        Raises:
            LeaseLostError: another start has the folder.
        """
        if (other := self._look()) is not None:
            raise LeaseLostError(
                f"--run-dir={self._run_dir}: another start ({other.name}) has taken it, because this one gave no sign of life for "
                f"{NUM_INTERVALS * self._holder.interval_s:g} s, or its job was started again; this one stops and writes nothing more"
            )

    def release(self) -> None:
        """The next start need not wait."""
        if self._look() is None:
            (self._run_dir / LEASE).unlink(missing_ok=True)

    def _look(self) -> Holder | None:
        found = read(self._run_dir)
        if found is not None and found.token != self._holder.token:
            self._lost_to = found
        return self._lost_to


def take(run_dir: Path, environment: Mapping[str, str]) -> Lease:
    """Takes the folder for this process, after ``exclusive.sole_writer``. May wait some seconds for a holder to move.

    Raises:
        ConfigError: another one holds it.
    """
    me = _myself(environment)
    found = read(run_dir)
    if found is not None and not me.follows(found):
        # The kernel's lock has decided here already, but for file systems that have none.
        is_here = me.is_on_kernel_of(found)
        if found.is_alive_here() and found.pid != me.pid if is_here else _moves(run_dir, found):
            raise refused(run_dir, LEASE, found.name)
    _write(run_dir, me)
    if (found := read(run_dir)) is not None and found.token != me.token:  # both saw a dead one at the same moment
        raise refused(run_dir, LEASE, found.name)
    return Lease(run_dir, me)


def read(run_dir: Path) -> Holder | None:
    """Who holds the folder, or did."""
    try:
        return Holder(**json.loads((run_dir / LEASE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_held_by(run_dir: Path, token: str) -> bool:
    """Whether the folder belongs to that start."""
    found = read(run_dir)
    return found is not None and found.token == token


def is_held_elsewhere(run_dir: Path) -> bool:
    """Whether a start on another machine has it, or had, whoever has the kernel's lock."""
    found = read(run_dir)
    return found is not None and found.machine.split()[0] != heartbeat.machine().split()[0]


def may_be_held(run_dir: Path) -> bool:
    """A quick look, for those who do not hold it: whether a start seems to be alive in there."""
    found = read(run_dir)
    if found is None or found.machine == heartbeat.machine():
        return found is not None and found.is_alive_here()
    with suppress(OSError):
        return time.time() - (run_dir / LEASE).stat().st_mtime < NUM_INTERVALS * found.interval_s
    return False


def refused(run_dir: Path, file: str, holder: str) -> ConfigError:
    """What a second start is told that found ``file``."""
    return ConfigError(
        f"--run-dir={run_dir}: another run is writing it ({holder}); wait for it, end it, or give another folder "
        f"(if its machine is gone for good: delete {run_dir / file})"
    )


def _moves(run_dir: Path, found: Holder) -> bool:
    """Whether the holder's counter rises, or the folder changes hands, within the intervals that it has."""
    deadline = time.monotonic() + NUM_INTERVALS * found.interval_s
    while time.monotonic() < deadline:
        time.sleep(found.interval_s / 4)
        now = read(run_dir)
        if now is None:
            return False
        if (now.token, now.counter) != (found.token, found.counter):
            return True
    return False


def _myself(environment: Mapping[str, str]) -> Holder:
    pid = os.getpid()
    restart = environment.get("SLURM_RESTART_COUNT", "0")
    return Holder(
        token=uuid.uuid4().hex[:12],
        host=os.uname().nodename,
        machine=heartbeat.machine(),
        pid=pid,
        started=heartbeat.start_ticks(pid),
        job=environment.get("SLURM_JOB_ID"),
        restart=int(restart) if restart.isdecimal() else 0,
        interval_s=INTERVAL_S,
        counter=0,
    )


def _write(run_dir: Path, holder: Holder) -> None:
    partial = run_dir / f"{LEASE}.{holder.token}"
    try:
        partial.write_text(json.dumps(asdict(holder)) + "\n", encoding="utf-8")
        partial.replace(run_dir / LEASE)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
