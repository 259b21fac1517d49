"""Ranks and nodes that do not come are named, and nobody waits for ever."""

from __future__ import annotations

import os
import socket
import time

import pytest

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
