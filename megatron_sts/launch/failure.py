"""How a rank says what went wrong: one line for the user's mistakes, a traceback for ours. Must not know torch."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_sts.config.errors import ConfigError
from megatron_sts.launch import lease, outcome, trail

LAUNCHED = "MEGATRON_STS_LAUNCHED"
"""The process id of our own launcher, which prints the one line itself."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Set by every torchelastic agent: where a worker leaves its last words."""

LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "NCCL communicator was aborted",
    "NCCL error",
    "wait timeout after",
    "Broken pipe",
    "Connection refused",
    "Socket Timeout",
    "failed to recv",
)
"""Parts of what gloo and NCCL say, in a bare RuntimeError, when it is another rank that did not come."""
CLOSED = ("closed by peer", "reset by peer", "Broken pipe", "Read error", "Connection refused", "remote process exited")
"""Parts of what is said when another process ended; not when it only does not come."""
LOST_CLASS = ("torch.distributed", "DistError")
"""Module and name of what torch's own errors of backend, store and network are derived from, whatever their text is."""
_TOLD = "_megatron_sts_told"


@dataclass(frozen=True)
class Told:
    """What a rank recorded of its error."""

    line: str
    is_lost: bool
    """Another rank is the cause; ``line`` is about that one."""
    is_first: bool
    """No other rank told before."""
    status: int = 1
    """The exit status of this rank."""


def is_users(error: BaseException) -> bool:
    """Wrong configs, and the ValueErrors that this package defines for wrong data; not a ValueError from elsewhere."""
    return isinstance(error, ValueError) and type(error).__module__.startswith("megatron_sts.")


def is_lost(error: BaseException) -> bool:
    """Whether it only says that another rank did not come."""
    seen: BaseException | None = error
    while seen is not None:
        if any((base.__module__, base.__name__) == LOST_CLASS for base in type(seen).__mro__):
            return True
        if type(seen) is RuntimeError and any(part in str(seen) for part in LOST):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def is_closed(error: BaseException) -> bool:
    """Whether a connection to another rank was closed: it is gone, or about to be."""
    return any(part in str(error) for part in CLOSED)


def may_be_lost(error: BaseException) -> bool:
    """Whether it came out of a collective, and says nothing that is known: another rank may be gone, or take part in another way,
    or this rank has called it wrongly."""
    return type(error) is RuntimeError and not is_lost(error) and trail.has_raised_waiting(error)


def told_of(error: BaseException) -> Told | None:
    """What was recorded of an error, if it was."""
    told: Told | None = getattr(error, _TOLD, None)
    return told


def remember(error: BaseException, told: Told) -> None:
    """Records what was found out, where the launcher looks too."""
    setattr(error, _TOLD, told)
    leave_words(told)


def report(error: Exception, run_dir: Path | None = None) -> int:
    """Print and record the exception being handled, also as the outcome in ``run_dir``; returns this rank's exit status."""
    told = told_of(error)
    if told is None:  # outside a training run, or before it began
        by_another = is_lost(error) or may_be_lost(error)
        told = Told(describe(error), by_another, not getattr(error, "is_echo", False), status_of(error))
        leave_words(told)
        if run_dir is not None:
            may_pass, nodes = getattr(error, "may_pass", False), getattr(error, "nodes", ())
            claim(run_dir, _about(told) + told.line, requeue=may_pass, nodes=nodes)
    if not is_users(error) and (not told.is_lost or (told.is_first and may_be_lost(error))):
        # One write, so that the tracebacks of several ranks do not interleave.
        sys.stderr.write(
            "".join(f"[rank {os.environ['RANK']}] {text}\n" for text in traceback.format_exc().splitlines())
        )
    say(told)
    return told.status


def claim(run_dir: Path, cause: str, *, requeue: bool = False, nodes: Sequence[str] = ()) -> None:
    """Leaves the failure of a run that does not hold its folder yet, unless another one does."""
    if not lease.may_be_held(run_dir):
        outcome.claim(run_dir, cause, requeue=requeue, nodes=nodes)


def status_of(error: BaseException) -> int:
    """A rank's exit status."""
    return 2 if isinstance(error, ConfigError) else 1


def say(told: Told) -> None:
    """The one line, unless our launcher or another rank says it."""
    if LAUNCHED not in os.environ and told.is_first:
        print(f"megatron-sts: error: {_about(told)}{told.line}", file=sys.stderr, flush=True)


def _about(told: Told) -> str:
    """Whose error it is, unless the line says it."""
    return "" if told.is_lost or told.line.startswith("rank ") else f"rank {os.environ['RANK']}: "


def leave(status: int) -> NoReturn:
    """Ends this rank at once. Taking down libraries whose collectives failed can crash, which would hide the reported cause."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def describe(error: Exception) -> str:
    """One line; with the exception's type unless the message was written for the user."""
    text = " ".join(str(error).split())
    line = text if is_users(error) else f"{type(error).__name__}: {text}".rstrip(": ")
    if may_be_lost(error):
        return f"rank {os.environ['RANK']} has lost another rank, or they disagree on what they exchange: {line}"
    return line


def leave_words(told: Told) -> None:
    """In torchelastic's format, whose summary then ends with the line. ``time`` is ours: whole seconds do not tell who was first."""
    if path := os.environ.get(ERROR_FILE):
        now = time.time()
        words = {"message": told.line, "timestamp": int(now), "time": now}
        words |= {"is_lost": told.is_lost, "is_first": told.is_first, "status": told.status}
        Path(path).write_text(json.dumps(words), encoding="utf-8")
