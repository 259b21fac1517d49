"""Faults in the code of a run: planted in its launcher's process, whose ranks are forked with them."""

from __future__ import annotations

import ctypes
import fcntl
import os
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from faults.moments import Moment

from megatron_sts.launch import meeting, trail
from megatron_sts.lds import sync
from megatron_sts.mcore.writing import Snapshot
from megatron_sts.train import batches, loop, same, step
from megatron_sts.train.feed import Feed
from megatron_sts.train.replicas import ReplicaCheck

FOR_EVER_S = 3600.0
SLOW_S = 2.0
FEW_BYTES = 2000
CLONE_NEWNET, SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x40000000, 0x8913, 0x8914, 1
"""Of Linux's unshare and ioctl."""
ROWS = ("tokens", "labels", "loss_mask", "position_ids", "is_visual", "is_instruction", "segments")
"""Fields of a batch that are [b, s]."""


def at(moment: Moment, act: Callable[[], None]) -> None:
    """Plants ``act``: called once, on its rank, in its step."""
    enter, seen = trail.enter, [0]

    def marked(phase: str, microbatch: int | None = None) -> None:
        enter(phase, microbatch)
        if is_here(moment, trail._place[1]) and phase == moment.phase:
            seen[0] += 1
            if seen[0] == moment.number + 1:
                moment.say()
                act()

    trail.enter = marked


def is_here(moment: Moment, number: int | None) -> bool:
    """Whether this process is the moment's rank, in its step."""
    return os.environ.get("RANK") == str(moment.rank) and number == moment.step


def wrap(owner: Any, name: str, change: Callable[..., Any]) -> None:
    """Has ``change(original, *args, **options)`` called instead."""
    setattr(owner, name, partial(change, getattr(owner, name)))


def wrap_method(owner: type, name: str, change: Callable[..., Any]) -> None:
    """The same for a method; ``change(original, self, ...)``."""
    original = getattr(owner, name)
    setattr(owner, name, lambda self, *args, **options: change(original, self, *args, **options))


def nothing(moment: Moment) -> None:
    """Only says when the moment has come."""
    at(moment, lambda: None)


def slowly(moment: Moment) -> None:
    """So that there is time for what comes from outside."""
    at(moment, lambda: time.sleep(SLOW_S))


def raising(error: Exception) -> Callable[[Moment], None]:
    def plant(moment: Moment) -> None:
        def act() -> None:
            raise error

        at(moment, act)

    return plant


def for_ever() -> None:
    time.sleep(FOR_EVER_S)


def stall(moment: Moment) -> None:
    at(moment, for_ever)


def leave(moment: Moment) -> None:
    at(moment, lambda: os._exit(7))


def reader(act: Callable[[], None]) -> Callable[[Moment], None]:
    """What reads ahead of the steps, in its thread."""

    def plant(moment: Moment) -> None:
        def change(read: Any, self: Feed, number: int) -> Any:
            if is_here(moment, number):
                moment.say()
                act()
            return read(self, number)

        wrap_method(Feed, "step", change)

    return plant


def unreadable() -> None:
    raise RuntimeError("the reader is broken")


def broken_losses(moment: Moment) -> None:
    """Two steps in a row, as many as ``guard.max_broken_updates``."""

    def change(loss: Any, *args: Any, **options: Any) -> Any:
        loss_sum, *others = loss(*args, **options)
        first, now = moment.step, trail._place[1]
        if now == first and not moment.said_in.exists():
            moment.say()
        return (loss_sum * float("nan") if now in (first, first + 1) else loss_sum, *others)

    wrap(step, "masked_loss", change)


def flipped_bit(moment: Moment) -> None:
    def change(check: Any, self: ReplicaCheck, number: int) -> None:
        if is_here(moment, number):
            moment.say()
            weight = next(iter(self._chunks[0].parameters())).detach()
            weight.view(-1)[:1].view(torch.int32).bitwise_xor_(1)
        check(self, number)

    wrap_method(ReplicaCheck, "check", change)


def full_disk(saves: Sequence[int]) -> Callable[[Moment], None]:
    """The kernel refuses to let this rank's files of these saves grow."""

    def plant(moment: Moment) -> None:
        numbers = []

        def change(write: Any, self: Snapshot) -> Any:
            numbers.append(1)
            soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            if os.environ["RANK"] == str(moment.rank) and len(numbers) in saves:
                moment.say()
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (FEW_BYTES, hard))
            try:
                return write(self)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

        wrap_method(Snapshot, "write", change)

    return plant


def hanging_disk(moment: Moment) -> None:
    def change(write: Any, self: Snapshot) -> Any:
        if os.environ["RANK"] == str(moment.rank):
            moment.say()
            for_ever()
        return write(self)

    wrap_method(Snapshot, "write", change)


def other_code(moment: Moment) -> None:
    def change(sources: Any, package: Path) -> dict[str, bytes]:
        return sources(package) | ({"train/step.py": b"other"} if said_at_start(moment) else {})

    wrap(same, "sources", change)


def other_library(moment: Moment) -> None:
    def change(version: Any, library: str) -> str | None:
        return "0.1" if library == "megatron-core" and said_at_start(moment) else version(library)

    wrap(same, "installed_version", change)


def other_config(moment: Moment) -> None:
    def change(run: Any, resolved: Any, *others: Any) -> None:
        if said_at_start(moment):
            config = resolved.config
            resolved = resolved.model_copy(update={"config": config.model_copy(update={"seed": config.seed + 1})})
        run(resolved, *others)

    wrap(loop, "run", change)


def said_at_start(moment: Moment) -> bool:
    """Whether this is the moment's rank; then it is said."""
    if os.environ.get("RANK") != str(moment.rank):
        return False
    if not moment.said_in.exists():
        moment.say()
    return True


def other_masks(moment: Moment) -> None:
    def change(draw: Any, *args: Any, **options: Any) -> Any:
        mask = draw(*args, **options)
        if mask.step != moment.step or not said_at_start(moment):
            return mask
        return replace(mask, rows=tuple(tuple(not skipped for skipped in row) for row in mask.rows))

    wrap(sync, "draw_mask", change)


def other_shapes(moment: Moment) -> None:
    """Rows that are eight tokens shorter."""

    def change(share: Any, *args: Any) -> Any:
        found = share(*args)
        if not is_here(moment, trail._place[1]):
            return found
        moment.say()
        return [replace(batch, **{name: getattr(batch, name)[:, :-8] for name in ROWS}) for batch in found]

    wrap(batches, "share", change)


def fewer_microbatches(moment: Moment) -> None:
    def change(run: Any, *args: Any, num_microbatches: int, **options: Any) -> Any:
        if is_here(moment, trail._place[1]):
            moment.say()
            num_microbatches = max(1, num_microbatches - 2)
        return run(*args, num_microbatches=num_microbatches, **options)

    wrap(step, "run_microbatches", change)


def never_starts(moment: Moment) -> None:
    def change(meet: Any, *args: Any) -> Any:
        if said_at_start(moment):
            for_ever()
        return meet(*args)

    wrap(meeting, "meet", change)


def closed_sockets(moment: Moment) -> None:
    """All connections of the rank to others."""

    def act() -> None:
        for descriptor in os.listdir("/proc/self/fd"):
            try:
                with socket.socket(fileno=os.dup(int(descriptor))) as found:
                    if found.family in (socket.AF_INET, socket.AF_INET6):
                        found.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    at(moment, act)


def cable_pulled(moment: Moment) -> None:
    """The run has a network of its own, a namespace, whose only interface goes down."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "no network namespace: needs root")
    set_loopback(up=True)
    at(moment, partial(set_loopback, up=False))


def has_namespaces() -> bool:
    """Whether this process may make them."""
    pid = os.fork()
    if pid == 0:
        os._exit(bool(ctypes.CDLL(None).unshare(CLONE_NEWNET)))
    return os.waitpid(pid, 0)[1] == 0


def set_loopback(*, up: bool) -> None:
    """Of this process's network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        found = fcntl.ioctl(any_socket, SIOCGIFFLAGS, struct.pack("16sH14x", b"lo", 0))
        flags = struct.unpack("16sH14x", found)[1]
        flags = flags | IFF_UP if up else flags & ~IFF_UP
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags))


def clock(hours: float) -> Callable[[Moment], None]:
    """The rank's clock jumps; then it waits for the other one."""

    def plant(moment: Moment) -> None:
        def act() -> None:
            now = time.time
            time.time = lambda: now() + 3600 * hours

        at(moment, act)
        slowly(replace(moment, rank=1 - moment.rank))

    return plant
