"""A full disk costs no run its metrics' lines, let alone the run."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from megatron_sts.train.metrics import RunLog

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
