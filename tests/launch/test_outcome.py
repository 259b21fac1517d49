"""How a run ended is in its folder: whole, the first failure of several, and with the place to go on from."""

from __future__ import annotations

import errno
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_sts.config.run_folder import COMPLETE
from megatron_sts.launch import lease, outcome


def test_the_newest_checkpoint_is_where_it_goes_on(tmp_path: Path) -> None:
    outcome.write(tmp_path, "stopped", "SIGINT")
    assert outcome.read(tmp_path) == outcome.Outcome("stopped", None, None, "SIGINT", False, said(tmp_path)["time"], [])
    for name in ("0-two-parts-0000004", "1-fine-0000012", "1-fine-0000003"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / COMPLETE).write_text("{}")
    outcome.write(tmp_path, "stopped", "SIGUSR1", requeue=True)
    assert {**said(tmp_path), "time": ""} == {
        "outcome": "stopped", "step": 12, "stage": "fine", "cause": "SIGUSR1", "requeue": True, "time": "", "nodes": []
    }  # fmt: skip
    outcome.clear(tmp_path)
    outcome.clear(tmp_path)
    assert outcome.read(tmp_path) is None


def test_of_failures_the_first_is_told(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        told = list(pool.map(lambda rank: outcome.claim(tmp_path, f"rank {rank}"), range(8)))
    assert told.count(True) == 1
    assert said(tmp_path)["cause"] == f"rank {told.index(True)}" and not said(tmp_path)["requeue"]
    assert [path.name for path in tmp_path.iterdir()] == [outcome.OUTCOME]


def test_what_cannot_be_written_or_read_is_no_outcome(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    outcome.write(tmp_path / "file", "done")
    assert not outcome.claim(tmp_path / "file", "cause") and outcome.read(tmp_path / "file") is None
    (tmp_path / outcome.OUTCOME).write_text('{"outcome": "do')
    assert outcome.read(tmp_path) is None


def test_a_full_disk_is_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write_text(path: Path, *_: object, **__: object) -> None:
        path.touch()  # names still fit
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_text)
    outcome.write(tmp_path, "failed", "cause")
    assert not outcome.claim(tmp_path, "cause")
    with pytest.raises(OSError, match="No space left"):
        lease.take(tmp_path, {})
    assert not list(tmp_path.iterdir())


def said(run_dir: Path) -> dict:
    return json.loads((run_dir / outcome.OUTCOME).read_text())
