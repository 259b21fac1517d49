"""One process at a time holds a run folder."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_sts.config.errors import ConfigError
from megatron_sts.launch import lease

LOCK = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""What file systems without locks say."""
HELD = "MEGATRON_STS_HELD"
"""In the environment of what the holder starts: the folder."""


@contextmanager
def sole_writer(run_dir: Path) -> Iterator[None]:
    """Makes ``run_dir`` and holds it while the block runs; the kernel frees it when this process ends, however that ends.

    A process whose launcher holds it goes on. The lock is one of POSIX: children do not share it, a second block in the same process is not kept out, and closing
    ``.lock`` anywhere in the process frees it. It decides on one machine only: some file systems have no locks, others keep that
    of a machine which is gone. Between machines ``launch.lease`` decides.

    Raises:
        ConfigError: another process holds it, or it cannot be written.
    """
    if os.environ.get(HELD) == str(run_dir.resolve()):
        yield
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK).open("a")
    except OSError as error:
        raise ConfigError(f"--run-dir={run_dir}: {error.strerror}; give a folder that can be written") from None
    with file:
        if _take(file):
            file.truncate(0)
            file.write(f"{os.getpid()}\n")  # of the process to end: the lease names one of its ranks
            file.flush()
        elif not lease.is_held_elsewhere(run_dir):
            pid = (run_dir / LOCK).read_text(encoding="ascii").strip()
            raise lease.refused(run_dir, LOCK, f"{os.uname().nodename}, pid {pid}" if pid else "on this machine")
        os.environ[HELD] = str(run_dir.resolve())
        try:
            yield
        finally:
            del os.environ[HELD]


def _take(file: IO[str]) -> bool:
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        if error.errno not in NO_LOCKS:
            raise
    return True
