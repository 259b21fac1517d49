"""What a checkpoint's files held when they were written: damage is found by it before anything is read."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import distributed as dist

from megatron_sts.config.run_folder import MANIFEST, manifest_of
from megatron_sts.runtime.dist import first_cause

ALGORITHM = "sha256"
BUFFER_BYTES = 1 << 20


class UnreadableError(ValueError):
    """Files that cannot be looked at, so that nobody knows whether they are damaged."""


class DigestedFile(io.RawIOBase):
    """A new file, with the digest of what is written into it. It must be written from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        self._file, self._found = path.open("wb", buffering=BUFFER_BYTES), hashlib.new(ALGORITHM)
        self.error: OSError | None = None
        """Of the first write that failed: torch's writer tells of another one, which names no cause."""

    @property
    def digest(self) -> str:
        """Of all that was written, in hexadecimal."""
        return self._found.hexdigest()

    def writable(self) -> bool:
        """Always."""
        return True

    def write(self, content: Any) -> int:
        """Appends bytes."""
        try:
            count = self._file.write(content)
        except OSError as error:
            self.error = self.error or error
            raise
        self._found.update(content)
        return count

    def tell(self) -> int:
        """Bytes written."""
        return self._file.tell()

    def close(self) -> None:
        """Leaves everything on disk."""
        if not self._file.closed:
            with self._file:
                self._file.flush()
                os.fsync(self._file.fileno())
        super().close()


@contextmanager
def digested(path: Path) -> Iterator[DigestedFile]:
    """A file to write into, on disk at the end.

    Raises:
        OSError: the disk takes no more; also where torch raises something else for it.
    """
    file = DigestedFile(path)
    try:
        yield file
        file.close()
    except RuntimeError as error:
        if file.error is None:
            raise
        raise file.error from error
    finally:
        file._file.close()


def write_text(path: Path, text: str) -> str:
    """Writes a small file, on disk at the end; its digest."""
    with digested(path) as file:
        file.write(text.encode())
    return file.digest


def sync(folder: Path) -> None:
    """Leaves the names in a folder on disk, on file systems that can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def digest_of(path: Path) -> str:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, ALGORITHM).hexdigest()


def write(checkpoint: Path, digests: Mapping[str, str]) -> None:
    """Writes the manifest of the files ``digests`` names, by their paths in ``checkpoint``."""
    write_text(checkpoint / MANIFEST, json.dumps({"algorithm": ALGORITHM, "files": dict(digests)}, indent=2))


def check(checkpoint: Path) -> str | None:
    """What is damaged in a checkpoint, if anything, alike on every rank: each looks at a part of the files; a collective of
    the process group, if there is one.

    Raises:
        UnreadableError: a rank cannot look, for a reason that is not the checkpoint's.
    """
    is_alone = not dist.is_initialized()
    rank, num_ranks = (0, 1) if is_alone else (dist.get_rank(), dist.get_world_size())
    damage = unreadable = None
    try:
        damage = _damage(checkpoint, rank, num_ranks)
    except OSError as error:
        unreadable = str(error)
    if not is_alone:
        damage, unreadable = first_cause(damage), first_cause(unreadable)
    if unreadable is not None:
        raise UnreadableError(unreadable)
    return damage


def _damage(checkpoint: Path, rank: int, num_ranks: int) -> str | None:
    path = manifest_of(checkpoint)
    folder = path.parent
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        algorithm, files = written["algorithm"], dict(written["files"])
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} is damaged ({error})"
    if algorithm != ALGORITHM:
        return f"{MANIFEST} has digests by {algorithm}, not {ALGORITHM}"
    missing = sorted(name for name in files if not (folder / name).is_file())
    if missing:
        return f"{missing[0]} is missing"
    # The largest are dealt out first, so that all ranks have about as much to read.
    names = sorted(files, key=lambda name: (-(folder / name).stat().st_size, name))
    changed = (name for name in names[rank::num_ranks] if digest_of(folder / name) != files[name])
    return next((f"{name} is not as it was written" for name in changed), None)
