"""Frames of a video, listed in an entry, are one image of a sample; what is no such list is left out, with a reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_sts.config.architecture import VisionConfig
from megatron_sts.config.tiles import clip
from megatron_sts.data.energon import EnergonStream
from megatron_sts.data.llava_json import LlavaJsonSource
from megatron_sts.data.prepare import prepare
from megatron_sts.data.records import BadSampleError, Clip, Record, Views
from megatron_sts.train.feed import _plain, _source
from megatron_sts.vision.tower import fitting_of
from tests.data.llava_files import picture

VISION = VisionConfig(num_layers=1, hidden_size=4, num_attention_heads=1, image_size=32, patch_size=8,
                      tiles={"resolutions": [[32, 64], [64, 64]]})  # fmt: skip


def write(folder: Path, *entries: dict[str, Any]) -> Path:
    for number in range(3):
        picture(folder / f"{number}.png", number)
    path = folder / "samples.json"
    path.write_text(json.dumps(entries))
    return path


def entry(video: Any, marker: str = "<video>", **more: Any) -> dict[str, Any]:
    said = [{"from": "human", "value": f"{marker}\nwhat happens?"}, {"from": "gpt", "value": "a cat jumps"}]
    return {"id": "clip", "video": video, "conversations": said, **more}


@pytest.mark.parametrize("marker", ["<video>", "<image>"])
def test_frames_are_one_image(tmp_path: Path, marker: str) -> None:
    record = LlavaJsonSource(write(tmp_path, entry(["0.png", "1.png", "2.png"], marker)), None, 0)[0]
    assert record.turns[0].text.startswith("<image>") and len(record.images) == 1
    found = record.images[0]()
    assert isinstance(found, Clip) and len(found.frames) == 3
    views = fitting_of(VISION).views(found, is_alone=True)
    assert views.way == "clip" and views.pixels.shape == (3, 32, 32, 3)
    assert clip(3, VISION).num_tokens == 3 * 4 + 1


def test_shards_keep_clips_and_a_checkpoint_too(tmp_path: Path) -> None:
    prepare(write(tmp_path, entry(["2.png", "0.png"])), tmp_path, tmp_path / "shards", 1, 1)
    settings: dict[str, Any] = {"seed": 1, "dp_rank": 0, "dp_size": 1, "num_workers": 0, "shuffle_buffer_size": 1}
    stream = EnergonStream(tmp_path / "shards", **settings, fitting=fitting_of(VISION))
    record = next(stream)
    assert isinstance(record, Record) and record.turns[0].text.startswith("<image>")
    [source] = record.images
    views = source()
    assert isinstance(views, Views) and (views.way, len(views.pixels)) == ("clip", 2)
    again = _source(_plain(views))()
    assert isinstance(again, Views) and np.array_equal(again.pixels, views.pixels) and again.way == "clip"
    assert all(isinstance(value, str | int | torch.Tensor) for value in _plain(views).values())
    stream.close()
    bare = EnergonStream(tmp_path / "shards", **settings, fitting=fitting_of(VISION.model_copy(update={"tiles": None})))
    record = next(bare)
    bare.close()
    assert isinstance(record, Record) and isinstance(record.images[0](), Clip)  # the model says that it sees none


@pytest.mark.parametrize(
    ("video", "more", "said"),
    [
        ("clip.mp4", {}, "video is one file; list the files of its frames"),
        (["0.png"], {"image": "1.png"}, "image, images and video name different pictures"),
        ({"file": "0.png"}, {}, "dict is no file name and no list of them"),
    ],
)
def test_what_is_no_list_of_frames(tmp_path: Path, video: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(BadSampleError, match=said):
        LlavaJsonSource(write(tmp_path, entry(video, **more)), None, 0)[0]


def test_a_video_without_frames(tmp_path: Path) -> None:
    record = LlavaJsonSource(write(tmp_path, entry(True)), None, 0)[0]
    with pytest.raises(BadSampleError, match="a video without frames"):
        record.images[0]()
