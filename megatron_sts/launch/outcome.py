"""RUN_DIR/outcome.json: how a run ended, for whoever started it, because torchrun turns every status into 1. Must not know torch."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from megatron_sts.config.run_folder import CHECKPOINTS, position, stage_of, whole_checkpoints

OUTCOME = "outcome.json"
Kind = Literal["done", "stopped", "failed"]


@dataclass(frozen=True)
class Outcome:
    """How a run ended. ``launch/slurm/README.md`` explains the fields to those who read the file."""

    outcome: Kind
    step: int | None
    """Steps of ``stage`` that the newest whole checkpoint holds: where the same command goes on. None without one."""
    stage: str | None
    cause: str | None
    """One line; None if done."""
    requeue: bool
    """Whether the same command should be started again, without anybody looking."""
    time: str
    """ISO 8601, UTC."""
    nodes: Sequence[str] = ()
    """Those, as SLURM names them, from which nothing came: a start without them may do better."""


def write(
    run_dir: Path, kind: Kind, cause: str | None = None, *, requeue: bool = False, nodes: Sequence[str] = ()
) -> None:
    """Replaces the outcome, in one piece. A disk that takes no more keeps what is there: the run's own end is what counts."""
    with suppress(OSError, ValueError):
        _written(run_dir, kind, cause, requeue, nodes).replace(run_dir / OUTCOME)


def claim(run_dir: Path, cause: str, *, requeue: bool = False, nodes: Sequence[str] = ()) -> bool:
    """Writes a failure unless an outcome is there; returns whether it did. Of ranks that fail together the first one tells."""
    try:
        written = _written(run_dir, "failed", cause, requeue, nodes)
    except (OSError, ValueError):
        return False
    try:
        os.link(written, run_dir / OUTCOME)
    except OSError:
        return False
    finally:
        written.unlink(missing_ok=True)
    return True


def place_to_go_on(run_dir: Path) -> str:
    """Where the same command goes on, in words."""
    newest = whole_checkpoints(run_dir / CHECKPOINTS)[-1:]
    return f"goes on from {newest[0]}" if newest else "starts from the beginning: there is no checkpoint yet"


def clear(run_dir: Path) -> None:
    """Forgets how an earlier start ended."""
    (run_dir / OUTCOME).unlink(missing_ok=True)


def read(run_dir: Path) -> Outcome | None:
    """How the last start ended; None while it goes on, or if nothing could be written."""
    try:
        return Outcome(**json.loads((run_dir / OUTCOME).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_there(run_dir: Path) -> bool:
    """Whether one was written, or cannot be looked for, as in a folder of somebody else's."""
    try:
        return (run_dir / OUTCOME).is_file()
    except OSError:
        return True


def _written(run_dir: Path, kind: Kind, cause: str | None, requeue: bool, nodes: Sequence[str]) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    newest = whole_checkpoints(run_dir / CHECKPOINTS)[-1:]
    step, stage = (position(newest[0])[1], stage_of(newest[0])) if newest else (None, None)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    found = Outcome(kind, step, stage, cause, requeue, now, list(nodes))
    path = run_dir / f".{OUTCOME}.{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}"
    try:
        path.write_text(json.dumps(asdict(found)) + "\n", encoding="utf-8")
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path
