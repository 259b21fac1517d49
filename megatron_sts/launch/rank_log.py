"""A rank's output is kept in a file of its own too. Must not know torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

LOG_DIR = "STS_LOG_DIR"
"""Set by the batch script: where ranks keep what they print."""


def keep(rank: int) -> None:
    """From here on what this process and its children print also goes to ``STS_LOG_DIR/rank-00000.log``, if that is set.

    Through ``tee``, a process of its own: the last words of a rank that is killed arrive.
    """
    if LOG_DIR not in os.environ:
        return
    path = Path(os.environ[LOG_DIR]) / f"rank-{rank:05d}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        print(f"megatron-sts: warning: no log of rank {rank}: {path}: {error.strerror}", file=sys.stderr, flush=True)
        return
    sys.stdout.flush()
    sys.stderr.flush()
    tee = subprocess.Popen(["tee", "-a", str(path)], stdin=subprocess.PIPE, start_new_session=True)
    assert tee.stdin is not None
    os.dup2(tee.stdin.fileno(), 1)
    os.dup2(tee.stdin.fileno(), 2)
    tee.stdin.close()
    tee.returncode = 0  # it ends after us: nobody waits for it
