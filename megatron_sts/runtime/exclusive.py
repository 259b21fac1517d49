"""One run at a time writes a run folder. Knows no config, no ranks."""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_sts.config.errors import ConfigError

LOCK = ".lock"
LEASE_S = 100.0
"""A file server keeps the lock of a node that died for a while: NFS for 90 s by default."""
_POLL_S = 1.0


@contextmanager
def sole_writer(run_dir: Path, patience_s: float = 0.0) -> Iterator[None]:
    """Holds ``run_dir`` for this process while the block runs; ends with the process, however that ends.

    A lock of the process (not of the open file), because data workers that outlive a killed rank would keep the other
    kind. Where a file system has no locks, nothing is checked.

    Raises:
        ConfigError: another process still holds it after ``patience_s``.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("w") as file:
        deadline = time.monotonic() + patience_s
        while not _take(file):
            if time.monotonic() >= deadline:
                raise ConfigError(
                    f"--run-dir={run_dir}: another run is writing it; wait for it, end it, or give another folder"
                )
            time.sleep(_POLL_S)
        yield


def _take(file: IO[str]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
    return True
