"""Calls ahead: in order, errors where the result is taken, and worker processes that can end."""

from __future__ import annotations

import multiprocessing
from threading import current_thread

import pytest

from megatron_sts.train.ahead import Ahead


def test_calls_run_in_order_in_one_thread() -> None:
    seen: list[tuple[int, str]] = []
    ahead = Ahead(lambda number: seen.append((number, current_thread().name)) or number**2, "reader")
    futures = [ahead.submit(number) for number in (3, 1, 2)]
    ahead.close(30)
    assert [future.result() for future in futures] == [9, 1, 4]
    assert seen == [(3, "reader"), (1, "reader"), (2, "reader")]


def test_an_error_is_raised_where_the_result_is_taken() -> None:
    ahead = Ahead(lambda number: 1 // number, "reader")
    broken, whole = ahead.submit(0), ahead.submit(1)
    with pytest.raises(ZeroDivisionError):
        broken.result()
    assert whole.result() == 1
    ahead.close(30)


def test_processes_forked_from_the_thread_end_well() -> None:
    def fork(_number: int) -> int | None:
        child = multiprocessing.get_context("fork").Process(target=int)
        child.start()
        child.join(30)
        return child.exitcode

    ahead = Ahead(fork, "reader")
    assert ahead.submit(0).result() == 0
    ahead.close(30)
