"""How a rank says what went wrong: one line for the user's mistakes, a traceback for ours. Must not know torch."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

from megatron_sts.config.errors import ConfigError
from megatron_sts.launch import outcome

LAUNCHED = "MEGATRON_STS_LAUNCHED"
"""The process id of our own launcher, which prints the one line itself."""

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"
"""Set by every torchelastic agent: where a worker leaves its last words."""


def is_users(error: BaseException) -> bool:
    """Wrong configs, and the ValueErrors that this package defines for wrong data; not a ValueError from elsewhere."""
    return isinstance(error, ValueError) and type(error).__module__.startswith("megatron_sts.")


def report(error: Exception, run_dir: Path | None = None) -> int:
    """Print and record the exception being handled, also as the outcome in ``run_dir``; returns this rank's exit status."""
    line = describe(error)
    if is_users(error):
        if LAUNCHED not in os.environ:
            print(f"megatron-sts: error: rank {os.environ['RANK']}: {line}", file=sys.stderr, flush=True)
    else:
        # One write, so that the tracebacks of several ranks do not interleave.
        sys.stderr.write(
            "".join(f"[rank {os.environ['RANK']}] {text}\n" for text in traceback.format_exc().splitlines())
        )
        sys.stderr.flush()
    _record(line)
    if run_dir is not None:
        outcome.claim(run_dir, f"rank {os.environ['RANK']}: {line}")
    return 2 if isinstance(error, ConfigError) else 1


def leave(status: int) -> NoReturn:
    """Ends this rank at once. Taking down libraries whose collectives failed can crash, which would hide the reported cause."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def describe(error: Exception) -> str:
    """One line; with the exception's type unless the message was written for the user."""
    text = " ".join(str(error).split())
    return text if is_users(error) else f"{type(error).__name__}: {text}".rstrip(": ")


def _record(line: str) -> None:
    """Leave the line in torchelastic's format. ``time`` is ours: whole seconds do not tell who failed first."""
    if path := os.environ.get(ERROR_FILE):
        now = time.time()
        extra = {"py_callstack": traceback.format_exc(), "timestamp": str(int(now)), "time": now}
        Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}), encoding="utf-8")
