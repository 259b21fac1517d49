"""Starts the ranks of a local run, which end with it, and says in one line why one failed. Must not know what a rank does."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_sts.launch import fork, heartbeat, lease, outcome
from megatron_sts.launch.cause import Failure, first, read_words
from megatron_sts.launch.failure import ERROR_FILE, LAUNCHED
from megatron_sts.launch.rank import act

HOST = "127.0.0.1"
POLL_S = 0.05
GRACE_S = 25.0
"""Ranks that are asked by SIGTERM to save have so long; SLURM kills after 30 s."""
SETTLE_S = 2.0
"""A rank that fails has so long to print why."""
LOST_SETTLE_S = 0.5
"""A rank that another one lost has so long to be seen dead."""


class _Stopped(BaseException):
    """A signal ends the run. Not an error: nothing may catch it on its way."""

    def __init__(self, number: int) -> None:
        self.number = number


class _Asked:
    """What signals asked for."""

    stop: int | None = None
    """The signal that ends the run. Kept, because what is imported meanwhile may catch anything."""
    save = False
    """SIGUSR1, which has to be handed to the ranks: it may come before there are any."""

    def check(self) -> None:
        if self.stop is not None:
            raise _Stopped(self.stop)


def launch_local(work: Callable[[], None], num_ranks: int, modules: Sequence[str], run_dir: Path | None = None) -> int:
    """Does ``work`` on local ranks until all have ended; returns the exit status.

    Args:
        work: what a rank does. What it raises is reported, and ends the other ranks.
        num_ranks: how many.
        modules: what ``work`` will import. Imported here, once for all ranks.
        run_dir: where it is left how this ended (``launch.outcome``), unless it ended well, which ``work`` itself says.
    """
    num_threads = _share_cores(num_ranks)
    os.environ[LAUNCHED] = str(os.getpid())
    with _signals() as asked:
        try:
            if fork.start_method() == "fork":
                fork.warm_up(modules)
            failures = _run(partial(_rank, work, num_threads), num_ranks, asked, run_dir)
        except _Stopped as stopped:
            name = signal.Signals(stopped.number).name
            print(f"megatron-sts: stopped by {name}", file=sys.stderr)
            if run_dir is not None and not lease.is_held_elsewhere(run_dir):
                outcome.write(run_dir, "stopped", name)
                _say_how_to_go_on(run_dir)
            return 128 + stopped.number
    if not failures:
        return 0
    cause = first(failures)
    print(f"megatron-sts: error: {cause.describe()}", file=sys.stderr, flush=True)
    if run_dir is not None and not lease.is_held_elsewhere(run_dir):
        outcome.write(run_dir, "failed", cause.describe())
        if cause.status != 2:  # else the command itself has to change, and the line above says how
            _say_how_to_go_on(run_dir)
    return 2 if cause.status == 2 else 1


def _say_how_to_go_on(run_dir: Path) -> None:
    print(f"megatron-sts: the same command {outcome.place_to_go_on(run_dir)}", file=sys.stderr, flush=True)


def _rank(work: Callable[[], None], num_threads: int | None) -> int:
    """In the child. A library that was loaded before it was known how many ranks there are has to be told its share."""
    if num_threads is not None and "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(num_threads)
    return act(work)


def _run(rank_work: fork.Work, num_ranks: int, asked: _Asked, run_dir: Path | None) -> list[Failure]:
    """Starts ranks, and ends those that are left when one failed or this process is stopped."""
    asked.check()
    method, ranks, ended = fork.start_method(), list[BaseProcess](), set[int]()
    with tempfile.TemporaryDirectory(prefix="megatron-sts-") as folder, socket.create_server((HOST, 0)) as listener:
        errors = [Path(folder) / f"{rank}.json" for rank in range(num_ranks)]
        port = listener.getsockname()[1]
        try:
            with fork.signals_held():
                for rank, path in enumerate(errors):
                    environment = _environment(rank, num_ranks, port) | {ERROR_FILE: str(path)}
                    ranks.append(fork.start(rank_work, environment, method))
            store = _serve(listener)
            seen = _wait(ranks, errors, asked)
            _settle(ranks, errors, seen)
            del store  # ranks met in it until now
        except _Stopped as stopped:
            if stopped.number == signal.SIGTERM:
                _let_save(ranks)
            raise
        finally:
            ended |= _end(ranks)
        return _failures(ranks, errors, seen, ended, run_dir)


def _failures(
    ranks: Sequence[BaseProcess],
    errors: Sequence[Path],
    seen: Mapping[int, float],
    ended: Collection[int] = (),
    run_dir: Path | None = None,
) -> list[Failure]:
    """Of the ranks that ended badly so far; ``ended``: those that were killed here."""
    return [
        Failure(
            number,
            rank.exitcode,
            seen.get(number, time.time()),
            read_words(errors[number]),
            number in ended,
            _place(run_dir, number, rank.pid),
        )
        for number, rank in enumerate(ranks)
        if rank.exitcode
    ]


def _place(run_dir: Path | None, number: int, pid: int | None) -> str:
    beat = None if run_dir is None else heartbeat.find(run_dir, number, pid)
    return "" if beat is None else beat.place


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """What torchrun gives to a rank of one node, whose agent keeps the store that ranks meet in: its port is never free."""
    return {
        **dict.fromkeys(("RANK", "LOCAL_RANK", "ROLE_RANK"), str(rank)),
        **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), str(num_ranks)),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
    }


def _serve(listener: socket.socket) -> Any:
    """The store behind ``listener``. It brings threads, so it comes after the forks; ranks that call earlier wait in line."""
    from torch.distributed import TCPStore

    port = listener.getsockname()[1]
    return TCPStore(HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def _wait(ranks: Sequence[BaseProcess], errors: Sequence[Path], asked: _Asked) -> dict[int, float]:
    """Until all ranks ended, or one failed or said that it does; when each was seen to have ended, in seconds since the epoch."""
    seen: dict[int, float] = {}
    while len(seen) < len(ranks):
        asked.check()
        if asked.save:
            asked.save = False
            for rank in ranks:
                if rank.exitcode is None and rank.pid is not None:
                    os.kill(rank.pid, signal.SIGUSR1)
        _note_ends(ranks, seen)
        if any(rank.exitcode for rank in ranks) or any(path.exists() for path in errors):
            break
        time.sleep(POLL_S)
    return seen


def _note_ends(ranks: Sequence[BaseProcess], seen: dict[int, float]) -> None:
    for number, rank in enumerate(ranks):
        if number not in seen and rank.exitcode is not None:
            seen[number] = time.time()


def _settle(ranks: Sequence[BaseProcess], errors: Sequence[Path], seen: dict[int, float]) -> None:
    """After a failure: until those that said that they fail have ended, and the cause is none that only lost another rank."""
    began = time.monotonic()
    while (waited := time.monotonic() - began) < SETTLE_S and len(seen) < len(ranks):
        _note_ends(ranks, seen)
        is_talking = any(rank.exitcode is None and path.exists() for rank, path in zip(ranks, errors, strict=True))
        failures = _failures(ranks, errors, seen)
        if failures and not is_talking and (waited > LOST_SETTLE_S or not first(failures).is_lost):
            break
        time.sleep(POLL_S)


def _let_save(ranks: Sequence[BaseProcess]) -> None:
    """Hands SIGTERM on: ranks that train save and end, others end at once."""
    for rank in ranks:
        if rank.exitcode is None and rank.pid is not None:
            os.kill(rank.pid, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_S
    while any(rank.exitcode is None for rank in ranks) and time.monotonic() < deadline:
        if any(rank.exitcode for rank in ranks):  # the others would save in vain
            break
        time.sleep(POLL_S)


def _end(ranks: Sequence[BaseProcess]) -> set[int]:
    """If not all ended well: neither a rank runs on nor a helper of one. By SIGKILL: a rank that lost another has nothing to
    save, and may be stopped. Returns those that were killed."""
    if not any(rank.exitcode != 0 for rank in ranks):
        return set()
    for number in fork.STOPPING:
        signal.signal(number, signal.SIG_IGN)  # they are obeyed already
    ended = {number for number, rank in enumerate(ranks) if rank.exitcode is None}
    for rank in ranks:
        _tell_group(rank, signal.SIGKILL)
    for rank in ranks:
        rank.join()
    return ended


def _tell_group(rank: BaseProcess, number: signal.Signals) -> None:
    assert rank.pid is not None
    try:
        os.killpg(rank.pid, number)
    except ProcessLookupError:  # nobody is left, or it does not lead one yet
        if rank.exitcode is None:
            os.kill(rank.pid, number)


@contextmanager
def _signals() -> Iterator[_Asked]:
    """Signals end this process by ``_Stopped``, and SIGUSR1 is remembered, while the block runs."""
    asked = _Asked()

    def stop(number: int, _frame: FrameType | None) -> None:
        # Ranks save already: a job's end comes to each process, and once more from who started it.
        if number == asked.stop == signal.SIGTERM:
            return
        asked.stop = number
        asked.check()

    def remember(_number: int, _frame: FrameType | None) -> None:
        asked.save = True

    before = {number: signal.signal(number, stop) for number in fork.heard()}
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, remember)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])  # held until now
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _share_cores(num_ranks: int) -> int | None:
    """Ranks share the cores, unless the user says how; returns a rank's number of threads where it is ours to say."""
    if "OMP_NUM_THREADS" in os.environ:
        return None
    num_threads = max(1, len(os.sched_getaffinity(0)) // num_ranks)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)
    return num_threads
