"""Every rank tells where it is, outside the collectives: a thread writes it to RUN_DIR/ranks/START. Must not know torch.

A beat is some hundred bytes, every ``interval_s``. Ranks read those of others only when one did not come. There too the first
rank that knows what went wrong leaves the notice by which all others end.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sts.launch import trail
from megatron_sts.launch.environment import node_name
from megatron_sts.launch.trail import Mark, Work

FOLDER = "ranks"
"""In RUN_DIR, with a folder for the newest start: RANK.json (where it is), and of a run that failed RANK.trail.json (where it
was), NOTICE and NCCL's own dumps. No start ever writes into that of another."""
ENDED = "ZX"
"""States of a process that has ended, though it is still in the kernel's list."""
NOTICE = "cause.json"
TELLER = ".teller"
LENGTH = 1024
"""Bytes of a beat, padded: readers never see half of one on top of half of another."""
GRACE_S = 4.0
"""Ranks that know of the cause end by themselves for so long."""


@dataclass(frozen=True)
class Beat:
    """What a rank's file says."""

    rank: int
    host: str
    machine: str
    """Whose process ids ``pid`` is one of, whatever it is called."""
    pid: int
    started: int
    """Of the process, in the kernel's ticks: another process may get its number."""
    number: int
    """Rises with every beat."""
    interval_s: float
    time: float
    mark: Mark
    where: str
    """The line of this package that its main thread was in."""
    is_waiting: bool
    """It waited there for other ranks."""
    work: Work | None = None
    """What its newest passes are made of."""

    @property
    def name(self) -> str:
        """Rank, node and process."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def place(self) -> str:
        """Phase and line."""
        return f"{self.mark.describe()}{f', at {self.where}' if self.where else ''}"


def interval_for(num_ranks: int) -> float:
    """Seconds between the beats of a rank: a hundred beats a second reach the file system, more only beyond 500 ranks."""
    return min(5.0, max(1.0, num_ranks / 100))


@functools.cache
def machine() -> str:
    """The boot of this machine and this process's namespace of process ids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def process(pid: int | str) -> tuple[str, int]:
    """The kernel's letter for the state of a process of this machine, and when it started; OSError if there is none."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])


def start_ticks(pid: int | str) -> int:
    """When a process of this machine started; OSError if there is none."""
    return process(pid)[1]


def prepare(run_dir: Path, token: str) -> Path:
    """Rank 0, before any rank beats: a folder for this start. Nothing of earlier ones stays."""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
    folder = run_dir / FOLDER / token
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read(folder: Path, rank: int) -> Beat | None:
    """Where a rank said last that it is."""
    try:
        found: dict[str, Any] = json.loads((folder / f"{rank}.json").read_text(encoding="utf-8"))
        work = found["work"] and Work(**found["work"])
        return Beat(**{**found, "mark": Mark(**found["mark"]), "work": work})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def find(run_dir: Path, rank: int, pid: int | None) -> Beat | None:
    """The beat of a rank that is or was this process."""
    beats = [read(folder, rank) for folder in (run_dir / FOLDER).glob("*")]
    return next((beat for beat in beats if beat is not None and beat.pid == pid), None)


def notice(folder: Path) -> str | None:
    """What ended the run, if a rank said so."""
    try:
        return str(json.loads((folder / NOTICE).read_text(encoding="utf-8"))["cause"])
    except (OSError, ValueError, KeyError):
        return None


def leave_notice(folder: Path, rank: int, cause: str) -> bool:
    """Says what ended the run; False if another rank did before. Where nothing can be written, nobody else could."""
    path = folder / f".{NOTICE}.{rank}"
    try:
        path.write_text(json.dumps({"rank": rank, "cause": cause}), encoding="utf-8")
        os.link(path, path.with_name(NOTICE))  # also where a file system still says that it is not there
        path.unlink()
    except FileExistsError:
        return False
    except OSError:  # a full disk, or the folder is another start's: then every rank that fails has to speak
        return notice(folder) is None
    return True


def may_tell(folder: Path) -> bool:
    """Whether this rank is the one that looks who did not come; it need not be done by thousands."""
    try:
        os.close(os.open(folder / TELLER, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


class Heartbeat:
    """This rank's beats. The thread is a daemon: a rank that fails ends although it beats."""

    def __init__(self, folder: Path, rank: int, num_ranks: int, each: Callable[[], None] = lambda: None) -> None:
        """``each`` is called with every beat, in its thread."""
        self._folder, self._rank, self._each = folder, rank, each
        self.interval_s = interval_for(num_ranks)
        self._number = 0
        self._seen: tuple[Mark, str, bool] | None = None
        self._seen_at = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begins to beat."""
        self.write()
        self._thread.start()

    def close(self) -> None:
        """Beats no more."""
        self._end.set()
        self._thread.join(self.interval_s)

    @property
    def waiting_s(self) -> float:
        """How long beats have found the main thread waiting for other ranks, at one place."""
        return self._still_s if self._seen is not None and self._seen[2] else 0.0

    @property
    def computing_s(self) -> float:
        """How long beats have found it at one place of a step. With NCCL a rank waits in any call that reads from the GPU."""
        return self._still_s if self._seen is not None and self._seen[0].phase in trail.COMPUTING else 0.0

    @property
    def _still_s(self) -> float:
        return time.monotonic() - self._seen_at

    def write(self, raised: str = "") -> None:
        """One beat. A disk that takes nothing must not end a run that could go on. ``raised``: the line where the rank failed."""
        self._number += 1
        (where, is_waiting), mark, work = trail.where(), trail.newest(), trail.work()
        where = raised or where
        if self._seen != (mark, where, is_waiting):
            self._seen, self._seen_at = (mark, where, is_waiting), time.monotonic()
        pid = os.getpid()
        identity = {"rank": self._rank, "host": node_name(), "machine": machine()}
        identity |= {"pid": pid, "started": start_ticks(pid)}
        now = {"number": self._number, "interval_s": self.interval_s, "time": time.time()}
        place = {"mark": asdict(mark), "where": where, "is_waiting": is_waiting}
        place["work"] = work and asdict(work)
        text = json.dumps({**identity, **now, **place}).ljust(LENGTH) + "\n"
        try:
            file = os.open(self._folder / f"{self._rank}.json", os.O_CREAT | os.O_WRONLY, 0o644)
            try:
                os.write(file, text.encode())
            finally:
                os.close(file)  # what other nodes see of it
        except OSError:
            pass

    def dump(self, raised: str = "") -> None:
        """Leaves where this rank was in its last steps."""
        steps = [{**asdict(mark), "time": round(mark.time, 3)} for mark in trail.marks()]
        try:
            path = self._folder / f"{self._rank}.trail.json"
            path.write_text(json.dumps({"where": raised or trail.where()[0], "marks": steps}) + "\n", encoding="utf-8")
        except OSError:
            pass

    def _beat(self) -> None:
        while not self._end.wait(self.interval_s):
            self.write()
            self._each()
