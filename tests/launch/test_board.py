"""A rank that waits in a call that never ends is ended from outside, if it is sure that another one will not come."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from threading import Timer

import pytest

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import load
from megatron_sts.launch import failure, heartbeat, lease, outcome, trail
from megatron_sts.launch.board import Board
from tests.launch.test_missing import beat


class Left(BaseException):
    """Instead of the process's end."""


@pytest.fixture
def board(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Board:
    """Of rank 0 of two, whose bound has passed; in a GPU's backward pass, which is no call that is known to wait."""

    def leave(status: int) -> None:
        raise Left(status)

    monkeypatch.setattr(failure, "leave", leave)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(failure.ERROR_FILE, str(tmp_path / "error.json"))
    heartbeat.prepare(tmp_path, "start")
    made = Board(tmp_path, "start", 0, 2, 1.0, None)
    trail.at("finetune", 7)
    trail.enter("backward", 1)
    made._heart._seen = trail.newest(), "train/step.py:1 (train_step)", False
    made._heart._seen_at = time.monotonic() - 10
    return made


def write_peer(tmp_path: Path, **changes: object) -> None:
    (tmp_path / heartbeat.FOLDER / "start" / "1.json").write_text(json.dumps(asdict(beat(1, **changes))))


def test_a_peer_that_is_gone(board: Board, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_peer(tmp_path, started=1)
    with pytest.raises(Left):
        board._look()
    line = f"rank 1 (nodea, pid {os.getpid()}) is gone; it was last in stage finetune, step 7, backward pass of micro-batch 2"
    assert capsys.readouterr().err.startswith(f"megatron-sts: error: {line}")
    assert json.loads((tmp_path / "error.json").read_text())["message"].startswith(line)
    assert (heartbeat.notice(tmp_path / heartbeat.FOLDER / "start") or "").startswith(line)
    assert outcome.read(tmp_path) is None  # the folder is not held here


def test_a_node_that_fell_silent_is_in_the_outcome(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next start can do without it."""
    write_peer(tmp_path, machine="another", host="nodeb", interval_s=0.05)
    monkeypatch.setattr(lease, "is_held_by", lambda *_: True)
    with pytest.raises(Left):
        board._look()
    found = outcome.read(tmp_path)
    assert found and (found.outcome, found.requeue, found.nodes) == ("failed", True, ["nodeb"])


def test_a_peer_that_computes(board: Board, tmp_path: Path) -> None:
    """Both may be at a long kernel."""
    write_peer(tmp_path, is_waiting=False)
    board._look()
    board._heart._seen = trail.newest(), "", True  # this one waits, though
    with pytest.raises(Left):
        board._look()


def test_long_phases_of_disks_are_left_alone(board: Board, tmp_path: Path) -> None:
    trail.enter("save")
    board._heart._seen = trail.newest(), "", False
    write_peer(tmp_path, started=1)
    board._look()
    assert heartbeat.notice(tmp_path / heartbeat.FOLDER / "start") is None


def test_another_ranks_notice_ends_it_after_a_while(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    board._heart._seen_at = time.monotonic()
    heartbeat.leave_notice(tmp_path / heartbeat.FOLDER / "start", 1, "rank 1: broken")
    board._look()
    monkeypatch.setattr(heartbeat, "GRACE_S", 0.0)
    with pytest.raises(Left):
        board._look()


def test_a_rank_that_failed_is_where_it_raised(board: Board, tmp_path: Path) -> None:
    """Not where it tells of that."""
    write_peer(tmp_path)
    with pytest.raises(ConfigError), board.open():
        load(tmp_path / "nowhere.yaml")
    found = heartbeat.read(tmp_path / heartbeat.FOLDER / "start", 0)
    assert found is not None and found.where.startswith("config/load.py:")
    trailed = json.loads((tmp_path / heartbeat.FOLDER / "start" / "0.trail.json").read_text())
    assert trailed["where"] == found.where


RESET = "Read error [127.0.0.1]:1: Connection reset by peer"


def test_a_connection_breaks_before_its_process_is_seen_to_be_gone(board: Board, tmp_path: Path) -> None:
    write_peer(tmp_path, is_waiting=True)  # of this very process, which runs
    later = Timer(0.5, write_peer, (tmp_path,), {"started": 1})
    later.start()
    told = board.record(RuntimeError(RESET))
    later.join()
    assert told.line.startswith(f"rank 1 (nodea, pid {os.getpid()}) is gone; it was last in") and told.is_lost


def test_a_closed_connection_is_not_taken_for_waiting(
    board: Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_sts.launch.board.SECOND_LOOK_S", 0.2)
    write_peer(tmp_path, is_waiting=True)
    told = board.record(RuntimeError(RESET))
    assert told.line.startswith(f"rank 0 lost its connection to another rank (RuntimeError: {RESET}); ")
    assert "waited in vain" not in told.line and "rank 1 (nodea" in told.line
