"""Starts and ends the process group. Every collective has a bound: ``timeout_s``."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_sts.config.errors import ConfigError
from megatron_sts.launch import meeting
from megatron_sts.runtime.device import current_device


@contextmanager
def process_group(timeout_s: float) -> Iterator[None]:
    """Joins the launcher's process group (or makes one of a single rank) and leaves it afterwards.

    On an error the group is left at once, without the closing barrier: peers blocked in a collective then fail within
    ``timeout_s``, and the launcher ends them as soon as it sees this rank's exit.

    Raises:
        MeetingError: not all ranks came within ``timeout_s``.
    """
    timeout = timedelta(seconds=timeout_s)
    backend = current_device().backend
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        me = meeting.rank_member(os.environ)
        store = meeting.meet(me, timeout_s)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=me.number, world_size=me.total)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def is_rank_zero() -> bool:
    """Whether this process reports for the whole run."""
    return dist.get_rank() == 0


def check_same_everywhere(what: str, text: str) -> None:
    """Refuses to go on when ranks hold different ``text``; a collective. They would wait for each other later.

    Raises:
        ConfigError: on every rank, naming ``what`` differs.
    """
    if differs(hashlib.sha256(text.encode()).digest()):
        raise ConfigError(f"{what} differs between ranks; start every rank with the same file, overrides and version")


def on_rank_zero[T](call: Callable[[], T]) -> T:
    """What ``call`` gives on rank 0, on every rank, and so a ConfigError that it raises there; a collective."""
    box: list[Any] = [None]
    if is_rank_zero():
        try:
            box = [call()]
        except ConfigError as error:
            box = [error]
    dist.broadcast_object_list(box, src=0)
    if isinstance(box[0], ConfigError):
        box[0].is_echo = not is_rank_zero()
        raise box[0]
    return box[0]


def first_cause(cause: str | None) -> str | None:
    """What went wrong on the first rank on which something did, if any, alike on every rank; a collective."""
    causes: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(causes, cause)
    found = ((rank, said) for rank, said in enumerate(causes) if said is not None)
    return next((f"rank {rank}: {said}" if len(causes) > 1 else said for rank, said in found), None)


def differs(digest: bytes, group: dist.ProcessGroup | None = None) -> bool:
    """Whether ranks of the group (None: all) hold different bytes, of the same number; a collective."""
    values = torch.frombuffer(bytearray(digest), dtype=torch.uint8).to(current_device().torch_device, torch.int64)
    lowest, highest = values.clone(), values.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    return not torch.equal(lowest, highest)


def any_rank(is_so: bool) -> bool:
    """Whether something is so on any rank; a collective."""
    return bool(max_over_ranks([float(is_so)])[0])


def max_over_ranks(values: list[float]) -> list[float]:
    """Element-wise maximum over all ranks; a collective."""
    tensor = torch.tensor(values, dtype=torch.float64, device=current_device().torch_device)
    dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor.tolist()


def mean_over_ranks(values: list[float]) -> list[float]:
    """Element-wise mean over all ranks; a collective."""
    tensor = torch.tensor(values, dtype=torch.float64, device=current_device().torch_device)
    dist.all_reduce(tensor)
    return (tensor / dist.get_world_size()).tolist()


def all_gather_numbers(values: dict[str, float]) -> list[dict[str, float]]:
    """Every rank's numbers, by the same names in the same order; a collective."""
    mine = torch.tensor(list(values.values()), dtype=torch.float64, device=current_device().torch_device)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return [dict(zip(values, each.tolist(), strict=True)) for each in found]


def broadcast_object(value: Any, group: dist.ProcessGroup) -> Any:
    """What the group's first rank holds, on all of its ranks; a collective."""
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]
