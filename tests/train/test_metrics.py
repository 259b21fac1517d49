"""A full disk costs no run its metrics' lines, let alone the run."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_sts.config.resolve import resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.train.metrics import RunLog
from tests.train.stagehand import config

LIMIT = 100


def test_lines_that_a_full_disk_does_not_take_come_later(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, tensorboard=False, enabled=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log.event("before", number=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, hard))  # the kernel lets no file grow, as on a full disk
    try:
        for number in range(1, 9):
            log.event("full", number=number)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "metrics.jsonl").stat().st_size == LIMIT
    log.event("after", number=9)
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(10))
    assert (
        capsys.readouterr().err
        == "megatron-sts: warning: metrics cannot be written (File too large); training goes on\n"
    )


def test_a_board_that_could_not_write_is_opened_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's own thread ends at the first error, and writes nothing more when the disk has room again."""
    written: list[tuple[int, int]] = []

    class Board:
        number = 0

        def __init__(self, _folder: str) -> None:
            Board.number += 1
            self.number = Board.number

        def add_scalar(self, _name: str, _value: float, step: int) -> None:
            if self.number == 1 and step == 1:
                raise OSError(28, "No space left on device")
            written.append((self.number, step))

        def close(self) -> None:
            pass

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Board)
    log = RunLog(tmp_path, tensorboard=True, enabled=True)
    log.start_stage(SimpleNamespace(name="only", num_steps=3), 0)  # type: ignore[arg-type]
    for step in range(3):
        line = {"stage": "only", "step": step, "loss": 1.0, "layers_skipped": 0, "layer_runs": [1], "tokens_per_s": 1.0}
        log.step(line)
    log.close()
    assert sorted(set(written)) == [(1, 0), (2, 2)]
    printed = capsys.readouterr()
    assert printed.out.startswith("megatron-sts: stage only, step 1/3, loss 1.000, 1 tokens/s\n")
    assert printed.err.count("metrics cannot be written (No space left on device)") == 1


def test_a_start_without_the_checkpoints_of_an_earlier_one_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = resolve(RunConfig.model_validate(config(guard={"checksum_interval_steps": 2})))
    RunLog(tmp_path, tensorboard=False, enabled=True).tell_start(resolved, is_anew=True)
    first = capsys.readouterr()
    assert first.out == "" and "checksum_interval_steps=2: no two ranks hold the same weights" in first.err
    log = RunLog(tmp_path, tensorboard=False, enabled=True)
    log.event("step")
    again = RunLog(tmp_path, tensorboard=False, enabled=True)
    again.tell_start(resolved, is_anew=False)
    assert capsys.readouterr().out == ""
    again.tell_start(resolved, is_anew=True)
    assert "no checkpoint is left: starting from the beginning" in capsys.readouterr().out
