"""Ranks find each other before there is a process group: within a bound, and with the names of those that did not come.

torchrun starts ranks once its agents have met; ranks of srun or of a script meet in a store that rank 0 keeps. Either way they
sign in here, and rank 0 looks who is missing.
"""

from __future__ import annotations

import re
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import groupby

import torch.distributed as dist

POLL_S = 0.2
NOTICE_S = 30.0
"""Rank 0 says whom it waits for after so long, and as often."""
MARGIN_S = 15.0
"""Others wait so much longer for rank 0's word than rank 0 for them: they started at another moment."""
MET = "met"


class MeetingError(ValueError):
    """Not all ranks came."""

    is_echo = False
    """Rank 0 says it."""
    may_pass = True
    """Another start may do better."""


def meet(timeout_s: float, environment: Mapping[str, str]) -> dist.Store:
    """The store of all ranks, once all have come.

    Raises:
        MeetingError: naming the ranks, and nodes as far as they are known, that did not come within ``timeout_s``.
    """
    rank, num_ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    store = _open(rank, num_ranks, timeout_s, environment)
    try:
        store.set(f"here/{rank}", socket.gethostname())
        missing = (
            _wait_for_all(store, num_ranks, timeout_s, environment) if rank == 0 else _wait_for_word(store, timeout_s)
        )
    except dist.DistError as error:
        raise MeetingError(
            f"rank {rank} ({socket.gethostname()}): rank 0 went away before all ranks had come ({_line(error)})"
        ) from None
    if missing:
        refusal = MeetingError(missing)
        refusal.is_echo = rank != 0
        raise refusal
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def _open(rank: int, num_ranks: int, timeout_s: float, environment: Mapping[str, str]) -> dist.Store:
    host, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    keeps = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not keeps:
        _wait_for_port(rank, host, port, timeout_s)
    timeout = timedelta(seconds=timeout_s)
    try:
        return dist.TCPStore(host, port, num_ranks, keeps, timeout, wait_for_workers=False, multi_tenant=True)
    except dist.DistError as error:
        where = (
            f"rank 0 cannot keep the store at {host}:{port}"
            if keeps
            else f"rank {rank} finds no store at {host}:{port}"
        )
        raise MeetingError(f"{where} ({_line(error)}); is MASTER_PORT free, and MASTER_ADDR the first node?") from None


def _wait_for_port(rank: int, host: str, port: int, timeout_s: float) -> None:
    """Quietly: torch would print C++ stacks with every attempt."""
    deadline, said = time.monotonic() + timeout_s, time.monotonic()
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            why = error.strerror or str(error) or type(error).__name__
        here = f"rank {rank} ({socket.gethostname()})"
        if time.monotonic() > deadline:
            raise MeetingError(
                f"{here}: nobody answered at {host}:{port} for {timeout_s:g} s ({why}): rank 0 did not start there, or no way leads "
                "there from this node; look at MASTER_ADDR and MASTER_PORT, and at the first node"
            )
        if time.monotonic() - said > NOTICE_S:
            said = time.monotonic()
            _say(f"{here}: waiting for rank 0 at {host}:{port} ({why})")
        time.sleep(POLL_S)


def _wait_for_all(store: dist.Store, num_ranks: int, timeout_s: float, environment: Mapping[str, str]) -> str:
    """Rank 0: until all have signed in, or it is told who did not. The word for all: empty if all came."""
    deadline, said = time.monotonic() + timeout_s, time.monotonic()
    missing = list(range(num_ranks))
    while missing := [rank for rank in missing if not store.check([f"here/{rank}"])]:
        who = describe(missing, num_ranks, environment)
        if time.monotonic() > deadline:
            word = f"{who} did not come within parallel.timeout_s={timeout_s:g}; look whether they started, and at their logs"
            store.set(MET, word)
            time.sleep(1)  # those that came read it before the store ends with this process
            return word
        if time.monotonic() - said > NOTICE_S:
            said = time.monotonic()
            _say(f"waiting for {who}")
        time.sleep(POLL_S)
    store.set(MET, "")
    return ""


def _wait_for_word(store: dist.Store, timeout_s: float) -> str:
    store.wait([MET], timedelta(seconds=timeout_s + MARGIN_S))
    return store.get(MET).decode()


def describe(missing: Sequence[int], num_ranks: int, environment: Mapping[str, str]) -> str:
    """As in: ranks 8-15 of 16 (node 1: gpu2)."""
    runs = []
    for _, group in groupby(enumerate(missing), lambda pair: pair[1] - pair[0]):
        ranks = [rank for _, rank in group]
        runs.append(str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}")
    per_node = int(environment.get("LOCAL_WORLD_SIZE", "0"))
    where = ""
    if 0 < per_node < num_ranks:
        names = expand(environment.get("SLURM_JOB_NODELIST", ""))
        is_known = len(names) * per_node == num_ranks
        nodes = sorted({rank // per_node for rank in missing})
        where = f" (node {', '.join(f'{node}: {names[node]}' if is_known else str(node) for node in nodes)})"
    return f"rank{'s' if len(missing) > 1 else ''} {', '.join(runs)} of {num_ranks}{where}"


def expand(nodes: str) -> list[str]:
    """The names in a node list of SLURM, as in a[1-3,07],b."""
    names: list[str] = []
    for prefix, ranges, suffix in re.findall(r"([^,\[\]]+)(?:\[([^\]]*)\])?([^,\[\]]*)", nodes):
        for part in ranges.split(",") if ranges else [""]:
            first, _, last = part.partition("-")
            numbers = range(int(first), int(last or first) + 1) if first else [None]
            names += [prefix + ("" if number is None else f"{number:0{len(first)}d}") + suffix for number in numbers]
    return names


def _say(text: str) -> None:
    print(f"megatron-sts: {text}", file=sys.stderr, flush=True)


def _line(error: Exception) -> str:
    """The first line: C++ stacks follow."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
