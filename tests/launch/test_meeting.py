"""Ranks and nodes that do not come are named, and nobody waits for ever."""

from __future__ import annotations

import os
import resource
import socket
import time
from datetime import timedelta

import pytest
from torch import distributed as dist

from megatron_sts.launch import meeting
from megatron_sts.launch.meeting import MeetingError, expand, node_member, rank_member
from megatron_sts.runtime.dist import process_group
from tests.dist.launch import run_ranks


def test_names_of_missing_ranks() -> None:
    place = {"RANK": "0", "WORLD_SIZE": "32", "MASTER_ADDR": "gpu1", "LOCAL_WORLD_SIZE": "8"}
    known = rank_member(place | {"SLURM_JOB_NODELIST": "gpu[1,3-04],head"})
    assert known.describe([0, 8, 9, 10, 15]) == "ranks 0, 8-10, 15 of 32 (node 0: gpu1, 1: gpu3)"
    assert rank_member(place).describe([7]) == "rank 7 of 32 (node 0)"
    assert rank_member(place | {"WORLD_SIZE": "8"}).describe([3]) == "rank 3 of 8"


def test_names_of_missing_nodes() -> None:
    place = {"SLURM_NODEID": "0", "SLURM_NNODES": "4", "SLURM_JOB_NODELIST": "gpu[1,3-04],head"}
    assert node_member(place, "gpu1", 1, "S").describe([1, 2, 3]) == "nodes 1-3 of 4 (gpu3, gpu4, head)"
    assert node_member(place | {"SLURM_JOB_NODELIST": "?"}, "gpu1", 1, "S").describe([2]) == "node 2 of 4"


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("", []),
        ("a", ["a"]),
        ("a,b2", ["a", "b2"]),
        ("n[08-10]", ["n08", "n09", "n10"]),
        ("x[1-2,7]-ib,y", ["x1-ib", "x2-ib", "x7-ib", "y"]),
    ],
)
def test_node_lists(nodes: str, names: list[str]) -> None:
    assert expand(nodes) == names


def test_nobody_keeps_the_store() -> None:
    with socket.socket() as probe:  # bound, but nobody listens
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        started = time.monotonic()
        with pytest.raises(MeetingError) as said:
            meeting.meet(rank_member(place), 1.0)
    assert time.monotonic() - started < 10
    assert f"rank 1 ({socket.gethostname()}): nobody answered at 127.0.0.1:{port} for 1 s (Connection refused)" in str(
        said.value
    )


def test_ranks_that_do_not_come() -> None:
    """Of four, the last two."""
    for output in run_ranks(two_of_four, 2, timeout_s=60):
        assert "SAID ranks 2-3 of 4 (node 1) did not come within parallel.timeout_s=2; look" in output
        assert "waiting for ranks 2-3 of 4 (node 1)" in output or "ECHO True" in output


def two_of_four() -> None:
    os.environ.update(WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
    meeting.NOTICE_S = 0.5
    with pytest.raises(MeetingError) as said, process_group(2.0):
        pass
    print("SAID", said.value, "ECHO", said.value.is_echo)


def test_a_start_does_not_meet_those_of_the_one_before() -> None:
    """torchrun --max-restarts keeps one store for all starts."""
    kept = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(kept.port)}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    meeting.meet(rank_member(place), 5.0).set("address", "of a rank that is gone")
    again = meeting.meet(rank_member(place | {"TORCHELASTIC_RESTART_COUNT": "1"}), 5.0)
    assert not again.check(["address"])
    with pytest.raises(MeetingError, match="rank 1 of 2 did not come"):
        meeting.meet(rank_member(place | {"WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "2"}), 0.5)


class Counting(dist.TCPStore):
    """Counts what it is asked."""

    num_requests = 0

    def add(self, key: str, number: int) -> int:
        self.num_requests += 1
        return super().add(key, number)

    def check(self, keys: list[str]) -> bool:
        self.num_requests += 1
        return super().check(keys)


def test_rank_0_asks_as_often_for_many_as_for_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "POLL_S", 0.01)
    store = Counting("127.0.0.1", 0, None, True, timedelta(seconds=30), wait_for_workers=False)
    two, many = member_of(2), member_of(300)
    store.set(two.key(0), "")
    for _ in range(2):  # started twice: it is still one rank of two
        dist.Store.add(store, two.count, 1)
    with pytest.raises(MeetingError, match="rank 1 of 2 did not come within"):
        meeting._wait_for_all(store, two, 0.1)
    for rank in range(1, 300):
        store.set(many.key(rank), "")
        dist.Store.add(store, many.count, 1)
    store.num_requests = 0
    meeting._wait_for_all(store, many, 10)
    assert store.num_requests == 2


def member_of(num_ranks: int) -> meeting.Member:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    return rank_member(place)


def test_more_ranks_than_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    before, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 300 + meeting.NUM_SPARE_FILES
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed - 1, allowed))
    try:
        meeting.allow_connections(member_of(300))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (needed, allowed)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, allowed))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    with pytest.raises(MeetingError, match=r"may open 4096 files, too few for connections to 16384 ranks; .* to 16640"):
        meeting.allow_connections(member_of(16384))
