"""The multi-process helper: order, failure and time limit."""

import os
import time

import pytest

from tests.dist.launch import RanksFailed, run_ranks


def report_rank() -> None:
    print("rank", os.environ["RANK"], "of", os.environ["WORLD_SIZE"], os.environ["GREETING"])


def fail_on_one() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("planted")


def hang_on_one() -> None:
    print("here", flush=True)
    if os.environ["RANK"] == "0":
        time.sleep(60)


def test_outputs_come_in_rank_order() -> None:
    assert run_ranks(report_rank, 3, 20, GREETING="hi") == [f"rank {rank} of 3 hi\n" for rank in range(3)]


def test_a_failing_rank_is_named_with_its_output() -> None:
    with pytest.raises(RanksFailed, match="rank 1 of 2 failed") as failure:
        run_ranks(fail_on_one, 2, 20)
    assert failure.value.returncodes == [0, 1]
    assert "planted" in failure.value.outputs[1] and "planted" in str(failure.value)


def test_the_time_limit_ends_a_hanging_rank() -> None:
    start = time.monotonic()
    with pytest.raises(RanksFailed, match=r"ranks \[0\] of 2 still ran after 2 s"):
        run_ranks(hang_on_one, 2, 2)
    assert time.monotonic() - start < 10
