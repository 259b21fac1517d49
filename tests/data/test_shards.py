"""One shard: pictures that training would skip are left out by name, and those that it changes are counted."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_sts.commands.data import tell
from megatron_sts.data.prepare import Summary
from megatron_sts.data.records import Reason
from megatron_sts.data.shards import WORK_FOLDER, ShardTask, read_report, write_shard
from tests.data.llava_files import turns


def test_pictures_are_counted_by_what_is_done_to_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / WORK_FOLDER).mkdir()
    Image.new("RGBA", (4, 4)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((4, 4), 60000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", (1, 33)).save(tmp_path / "strip.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    asked = [["clear"], ["deep"], ["plain"], ["clear", "strip"], ["clear", "plain"]]
    entries = [
        {"id": " ".join(names), "image": [f"{name}.png" for name in names], "conversations": turns(len(names))}
        for names in asked
    ]
    report = write_shard(ShardTask(0, 0, entries, tmp_path, tmp_path))
    assert report == read_report(tmp_path, 0)
    assert report.num_samples == 4
    [rejected] = report.rejected
    assert rejected["id"] == "clear strip" and rejected["reason"] == Reason.UNFIT
    assert rejected["detail"] == "image strip.png: 1 x 33 pixels, longer than 32 times its width or height; cut it"
    assert report.changes == {"transparency laid on white": 2, "grey of more than 8 bits scaled to 8": 1}
    assert tell(Summary(4, 1, Counter(), Counter(report.changes)), tmp_path / "a.json", tmp_path) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "2 │ transparency laid on white" in printed and "1 │ grey of more than 8 bits" in printed
