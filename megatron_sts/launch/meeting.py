"""Ranks, and before them nodes, find each other: within a bound, and with the names of those that did not come.

torch's own ways to meet say nothing for minutes, and nobody's name. Ranks sign in here before there is a process group, in a
store that rank 0 keeps or the launcher; the tasks of torchrun's nodes before torch's elastic agents meet, on the same server.
"""

from __future__ import annotations

import re
import resource
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import groupby

import torch.distributed as dist

from megatron_sts.launch.environment import DEFAULT_PORT, node_name, rank_from

POLL_S = 0.2
NOTICE_S = 30.0
"""Number 0 says whom it waits for after so long, and as often."""
MARGIN_S = 15.0
"""Others wait so much longer for number 0's word than number 0 for them: they started at another moment."""
NUM_SPARE_FILES = 256
"""What a process opens beside a connection to each of those that meet."""


class MeetingError(ValueError):
    """Not all came."""

    is_echo = False
    """Number 0 says it."""
    may_pass = True
    """Another start may do better."""
    nodes: tuple[str, ...] = ()
    """On which those are that did not come, as far as that is known."""


@dataclass(frozen=True)
class Member:
    """One of those that are to meet, and where."""

    noun: str
    """What each of them is."""
    number: int
    total: int
    host: str
    port: int
    is_keeper: bool
    """The store is kept in this process; else in number 0's, or in the launcher's."""
    bound: str
    """What the user calls the bound."""
    remedy: str
    """What to look at if some do not come."""
    nodes: tuple[str, ...] = ()
    """Their names in the order of ranks; empty if unknown."""
    per_node: int = 1
    """How many of them are on a node; 0 if unknown."""
    start: str = "0"
    """Which one this is, where a launcher that keeps the store starts them again: what an earlier one left there is not theirs."""

    @property
    def name(self) -> str:
        """As in: rank 3 (gpu1)."""
        return f"{self.noun} {self.number} ({node_name()})"

    @property
    def word(self) -> str:
        """Under which number 0 leaves its word in the store."""
        return f"{self.noun}s/met"

    @property
    def count(self) -> str:
        """Where the store counts who has signed in: number 0 asks for that alone, as to ask for each of thousands would keep it busy."""
        return f"{self.noun}s/came"

    def key(self, number: int) -> str:
        """Under which one signs in."""
        return f"{self.noun}s/{number}"

    @property
    def first(self) -> str:
        """Whom the others look for."""
        return f"{self.noun} 0"

    def describe(self, missing: Sequence[int]) -> str:
        """As in: ranks 8-15 of 16 (node 1: gpu2); nodes 1, 3 of 4 (gpu2, gpu4)."""
        runs = []
        for _, group in groupby(enumerate(missing), lambda pair: pair[1] - pair[0]):
            numbers = [number for _, number in group]
            runs.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
        where = ""
        if 0 < self.per_node < self.total:
            numbers, names = sorted({number // self.per_node for number in missing}), self.nodes_of(missing)
            if self.noun == "node":
                where = f" ({', '.join(names)})" if names else ""
            elif names:
                where = f" (node {', '.join(f'{node}: {name}' for node, name in zip(numbers, names, strict=True))})"
            else:
                where = f" (node {', '.join(map(str, numbers))})"
        return f"{self.noun}{'s' if len(missing) > 1 else ''} {', '.join(runs)} of {self.total}{where}"

    def nodes_of(self, members: Sequence[int]) -> tuple[str, ...]:
        """The names of the nodes that these are on; empty if unknown."""
        if self.per_node == 0 or len(self.nodes) * self.per_node != self.total:
            return ()
        return tuple(self.nodes[node] for node in sorted({member // self.per_node for member in members}))


def rank_member(environment: Mapping[str, str]) -> Member:
    """The rank that this process is.

    Raises:
        ConfigError: the environment does not say who it is, or where ranks meet.
    """
    rank = rank_from(environment)
    assert rank is not None, "only ranks meet"
    return Member(
        noun="rank",
        number=rank.rank,
        total=rank.world_size,
        host=environment["MASTER_ADDR"],
        port=int(environment.get("MASTER_PORT", DEFAULT_PORT)),
        is_keeper=rank.rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        bound="parallel.timeout_s",
        remedy="look whether they started, and at their logs",
        nodes=tuple(expand(environment.get("SLURM_JOB_NODELIST", ""))),
        per_node=int(environment.get("LOCAL_WORLD_SIZE", "0")),
        start=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def node_member(environment: Mapping[str, str], host: str, port: int, bound: str) -> Member:
    """The node whose task this process is, of a job of SLURM."""
    number = int(environment["SLURM_NODEID"])
    return Member(
        noun="node",
        number=number,
        total=int(environment["SLURM_NNODES"]),
        host=host,
        port=port,
        is_keeper=number == 0,
        bound=bound,
        remedy="sinfo --Node --long says how SLURM finds them",
        nodes=tuple(expand(environment["SLURM_JOB_NODELIST"])),
    )


def meet(member: Member, timeout_s: float) -> dist.Store:
    """The store of all members, once all have come.

    Raises:
        MeetingError: naming the members, and nodes as far as they are known, that did not come within ``timeout_s``.
    """
    store = dist.PrefixStore(f"start {member.start}", _open(member, timeout_s))
    try:
        store.set(member.key(member.number), "here")
        store.add(member.count, 1)
        if member.number == 0:
            _wait_for_all(store, member, timeout_s)
        else:
            _wait_for_word(store, member, timeout_s)
    except dist.DistError as error:
        raise MeetingError(
            f"{member.name}: {member.first} went away before all {member.noun}s had come ({_line(error)})"
        ) from None
    store.set_timeout(timedelta(seconds=timeout_s))
    return store


def _open(member: Member, timeout_s: float) -> dist.Store:
    at = f"{member.host}:{member.port}"
    if member.is_keeper:
        allow_connections(member)
    else:
        _wait_for_port(member, timeout_s)
    timeout = timedelta(seconds=timeout_s)
    try:  # multi-tenant: what this process opens at the same port later is the same server
        return dist.TCPStore(
            member.host, member.port, member.total, member.is_keeper, timeout, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        where = f"{member.first} cannot keep the store" if member.is_keeper else f"{member.name} finds no store"
        raise MeetingError(
            f"{where} at {at} ({_line(error)}); is MASTER_PORT free, and MASTER_ADDR the first node?"
        ) from None


def allow_connections(member: Member) -> None:
    """Raises this process's limit of open files where it is too low, as the usual 1,024 are, for a store with a connection to each.

    Raises:
        MeetingError: the system does not allow it. The store would leave those beyond without an answer.
    """
    needed = member.total + NUM_SPARE_FILES
    limit, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        refusal = MeetingError(
            f"{member.name} may open {allowed} files, too few for connections to {member.total} {member.noun}s; "
            f"raise the hard limit (ulimit -Hn) of its node to {needed}"
        )
        refusal.may_pass = False
        raise refusal
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, allowed))


def _wait_for_port(member: Member, timeout_s: float) -> None:
    """Quietly: torch would print C++ stacks with every attempt."""
    deadline, said = time.monotonic() + timeout_s, time.monotonic()
    at = f"{member.host}:{member.port}"
    while True:
        try:
            socket.create_connection((member.host, member.port), timeout=5).close()
            return
        except OSError as error:
            why = error.strerror or str(error) or type(error).__name__
        if time.monotonic() > deadline:
            raise MeetingError(
                f"{member.name}: nobody answered at {at} for {timeout_s:g} s ({why}): {member.first} did not start there, or no way "
                "leads there from this node; look at MASTER_ADDR and MASTER_PORT, and at the first node"
            )
        if time.monotonic() - said > NOTICE_S:
            said = time.monotonic()
            _say(f"{member.name}: waiting for {member.first} at {at} ({why})")
        time.sleep(POLL_S)


def _wait_for_all(store: dist.Store, member: Member, timeout_s: float) -> None:
    """Number 0: until all have signed in, or it is time to say who did not; leaves the word for the others: empty if all came."""
    deadline, said = time.monotonic() + timeout_s, time.monotonic()
    while not _all_came(store, member):
        time.sleep(POLL_S)
        is_late = time.monotonic() > deadline
        if not is_late and time.monotonic() - said < NOTICE_S:
            continue
        missing = [number for number in range(member.total) if not store.check([member.key(number)])]
        if not missing:  # the last ones came just now
            continue
        who = member.describe(missing)
        if is_late:
            word = f"{who} did not come within {member.bound}={timeout_s:g}; {member.remedy}"
            store.set(member.word, word)
            time.sleep(1)  # those that came read it before the store ends with this process
            refusal = MeetingError(word)
            refusal.nodes = member.nodes_of(missing)
            raise refusal
        said = time.monotonic()
        _say(f"waiting for {who}")
    store.set(member.word, "")


def _all_came(store: dist.Store, member: Member) -> bool:
    """One small request while they come; then one for all names, as one that was started twice counts twice."""
    return store.add(member.count, 0) >= member.total and store.check([member.key(n) for n in range(member.total)])


def _wait_for_word(store: dist.Store, member: Member, timeout_s: float) -> None:
    store.wait([member.word], timedelta(seconds=timeout_s + MARGIN_S))
    if word := store.get(member.word).decode():
        refusal = MeetingError(word)
        refusal.is_echo = True
        raise refusal


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
