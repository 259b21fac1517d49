"""Weights & Biases gets the numbers of metrics.jsonl; a start in the same folder goes on with the same page."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from wandb.proto import wandb_internal_pb2

from megatron_sts.cli import main
from megatron_sts.config.logs import WandbConfig
from megatron_sts.train.wandb_board import WandbBoard
from tests.train.stagehand import act, config, lines, scene

OFFLINE = {"project": "sts", "mode": "offline", "tags": ["test"]}


def records(run_dir: Path) -> Iterator[Any]:
    """What wandb itself wrote, over all starts."""
    for path in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        for data in chunks(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            yield record


def chunks(content: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format, in blocks of 32 KiB, behind a header of seven bytes."""
    at, data = 7, b""
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:  # no place for another header
            at += 32768 - at % 32768
            continue
        _checksum, length, kind = struct.unpack_from("<IHB", content, at)
        data += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield data
            data = b""


def logged(run_dir: Path) -> list[dict[str, Any]]:
    """The items of each history record."""
    histories = [record.history for record in records(run_dir) if record.WhichOneof("record_type") == "history"]
    return [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in history.item} for history in histories
    ]


@pytest.mark.timeout(200)
def test_numbers_arrive_and_a_resumed_run_keeps_its_page(tmp_path: Path) -> None:
    run, logging = tmp_path / "run", {"tensorboard": False, "wandb": OFFLINE}
    stages = config()["stages"][1:]
    short = config(stages=stages, logging=logging)
    assert act(1, scene(run, short), scene(run, short | {"logging": {**logging, "slow_rank_share": 0.5}})) == [[0, 0]]
    steps = [line for line in lines(run) if "event" not in line]
    found = [row for row in logged(run) if "finetune/loss" in row]
    assert [row["finetune/step"] for row in found] == [0, 1, 2, 3] == [line["step"] for line in steps]
    for row, line in zip(found, steps, strict=True):
        assert row["finetune/loss"] == line["loss"] and row["finetune/flops_executed"] == line["flops_executed"]
        assert "finetune/skip_digest" not in row
    ids = {record.run.run_id for record in records(run) if record.WhichOneof("record_type") == "run"}
    assert ids == {(run / "wandb_id").read_text()}


def test_without_a_server_training_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    def unreachable(**_options: Any) -> None:
        raise wandb.errors.CommError("no server\nthere")

    monkeypatch.setattr(wandb, "init", unreachable)
    told: list[str] = []
    board = WandbBoard(WandbConfig(project="sts"), tmp_path, {}, told.append)
    board.step("finetune", 0, {"loss": 1.0})
    board.close()
    assert told == [
        "Weights & Biases: no server there; training goes on without it (logging.wandb.mode=offline writes it here)"
    ]


@pytest.mark.parametrize("failing", ["define_metric", "log", "finish"])
def test_what_its_process_does_costs_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """wandb hands what it gets to a process of its own. Once that was killed, its calls raise this (wandb 0.31)."""
    import wandb

    page = Mock(**{f"{failing}.side_effect": ConnectionResetError("Connection lost")})
    monkeypatch.setattr(wandb, "init", lambda **_options: page)
    told: list[str] = []
    board = WandbBoard(WandbConfig(project="sts", mode="offline"), tmp_path, {}, told.append)
    for step in range(3):
        board.step("finetune", step, {"loss": 1.0})
    board.close()
    assert told == ["Weights & Biases: Connection lost; training goes on without it"]


def test_a_missing_package_is_told_before_ranks_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else real(name, *a))
    words = ["train", "examples/quickstart", "logging.wandb={project: sts}", "--run-dir", str(tmp_path / "run")]
    assert main(words) == 2
    assert "logging.wandb.project=sts: the package wandb is not installed; pip install" in capsys.readouterr().err
