"""Digests are those of what is on disk, damage is named by file, and a full disk says that it is full."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, cast

import pytest
import torch

from megatron_sts.config.run_folder import MANIFEST, manifest_of
from megatron_sts.runtime import integrity
from megatron_sts.runtime.integrity import UnreadableError, digest_of, digested


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Three files, one of them a tensor."""
    digests = {}
    for number in range(2):
        digests[f"{number}.txt"] = integrity.write_text(tmp_path / f"{number}.txt", f"{number}" * 1000)
    (tmp_path / "state").mkdir()
    with digested(tmp_path / "state" / "tensor.pt") as file:
        torch.save(torch.arange(100_000), cast(IO[bytes], file))
    digests["state/tensor.pt"] = file.digest
    integrity.write(tmp_path, digests)
    return tmp_path


def test_digests_are_of_what_is_written(checkpoint: Path) -> None:
    files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert len(files) == 3 and all(digest_of(checkpoint / name) == digest for name, digest in files.items())
    assert torch.equal(torch.load(checkpoint / "state" / "tensor.pt"), torch.arange(100_000))
    assert integrity.check(checkpoint) is None


def test_manifests_of_earlier_versions_are_read(checkpoint: Path) -> None:
    state = checkpoint / "state"
    (checkpoint / MANIFEST).unlink()
    integrity.write(state, {"tensor.pt": digest_of(state / "tensor.pt")})
    assert manifest_of(checkpoint) == state / MANIFEST and integrity.check(checkpoint) is None
    (state / "tensor.pt").write_bytes(b"")
    assert integrity.check(checkpoint) == "tensor.pt is not as it was written"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / "state" / "tensor.pt").unlink(), "state/tensor.pt is missing"),
        (lambda path: (path / "1.txt").write_text("1" * 999 + "0"), "1.txt is not as it was written"),
        (lambda path: (path / "1.txt").write_text("1" * 999), "1.txt is not as it was written"),
        (lambda path: (path / MANIFEST).unlink(), "it has no integrity.json"),
        (lambda path: (path / MANIFEST).write_text("{"), "integrity.json is damaged (Expecting"),
        (lambda path: (path / MANIFEST).write_text("[1]"), "integrity.json is damaged (list indices"),
        (lambda path: (path / MANIFEST).write_text('{"algorithm": "md5", "files": {}}'), "integrity.json has digests by md5"),
    ],
)  # fmt: skip
def test_damage_is_named(checkpoint: Path, damage: Callable[[Path], object], said: str) -> None:
    damage(checkpoint)
    assert str(integrity.check(checkpoint)).startswith(said)


def test_files_that_cannot_be_looked_at_are_not_called_damaged(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Path) -> str:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(integrity, "digest_of", fail)
    with pytest.raises(UnreadableError, match="Input/output error"):
        integrity.check(checkpoint)


@pytest.mark.parametrize("count", [10, 10_000_000])
def test_a_full_disk_says_so(count: int) -> None:
    """torch's own writer says 'unexpected pos'."""
    with pytest.raises(OSError, match="No space left on device"), digested(Path("/dev/full")) as file:
        torch.save(torch.zeros(count), cast(IO[bytes], file))
