"""Samples that others made, as training reads them: text for a model without a tower, and conversations that are too long."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sts.data.batch import Batch
from megatron_sts.data.prepare import prepare
from megatron_sts.train.feed import Fed
from tests.data.llava_files import picture, turns
from tests.dist.ladder import BATCH, Written, resolved_run, train_alone, written_run
from tests.train.test_feed import feed, texts

SOURCES = ["llava_json", "energon"]


def write(folder: Path, source: str, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """The entries as a data section."""
    path = folder / "samples.json"
    path.write_text("\n".join(map(json.dumps, entries)))
    if source == "llava_json":
        return {"source": source, "path": str(path)}
    prepare(path, folder, folder / "shards", shard_size_mb=1, num_workers=1)
    return {"source": source, "path": str(folder / "shards"), "num_workers": 0, "shuffle_buffer_size": 1}


def run(data: dict[str, Any], sequence_length: int, **changes: Any) -> Written:
    stage: Written = {"name": "one", "steps": 2, "batch": {**BATCH, "sequence_length": sequence_length}}
    return written_run(Path(), {**stage, **changes}) | {"data": data}


def first_step(written: Written) -> Fed:
    opened = feed(resolved_run(written))
    fed = opened.step(0)
    opened.close()
    return fed


def skipped(fed: Fed) -> set[tuple[str, str]]:
    return {(sample.key, sample.reason) for sample in fed.batches[0].skipped}


@pytest.mark.parametrize("source", SOURCES)
def test_text_trains_without_a_tower_and_pictures_are_named(tmp_path: Path, source: str) -> None:
    picture(tmp_path / "a.png", 1)
    entries = [{"id": str(number), "conversations": turns(0, "the cat")} for number in range(3)]
    entries.append({"id": "seen", "image": "a.png", "conversations": turns(1)})
    written = run(write(tmp_path, source, entries), 48, steps=3)
    written["model"] |= {"vision": None}
    fed = first_step(written)
    assert skipped(fed) == {("seen", "an image, but model.vision is null")}
    assert all(batch.pixels is None for batch in fed.batches) and len(set(texts(fed.batches))) == 1
    if source == "llava_json":
        losses = train_alone(written).losses
        assert losses[2] < losses[0] < 8  # nats; ln 1024 = 6.9 at first, and the first step warms up


def long_entries(folder: Path) -> list[dict[str, Any]]:
    picture(folder / "a.png", 1)
    many = [turn for number in range(4) for turn in turns(0, f"the cat {number}")]
    return [
        {"id": "short", "conversations": turns(0, "the cat 0")},
        {"id": "four rounds", "conversations": many},
        {"id": "long answer", "conversations": turns(0, "the cat " * 40)},
        {"id": "late image", "image": "a.png", "conversations": [*many, *turns(1)]},
    ]


def lengths(batch: Batch) -> list[int]:
    return batch.segments.sum(1).tolist()


@pytest.mark.parametrize("packing", ["pad", "pack"])
@pytest.mark.parametrize("source", SOURCES)
def test_too_long_samples_are_left_out_or_cut(tmp_path: Path, source: str, packing: str) -> None:
    data = write(tmp_path, source, long_entries(tmp_path))
    batch = {**BATCH, "sequence_length": 40, "packing": packing}
    cut = first_step(run(data | {"too_long": "truncate"}, 40, batch=batch))
    whole = first_step(run(data, 40, batch=batch))
    field = "stages.one.batch.sequence_length=40"
    assert {key for key, _ in skipped(whole)} == {"four rounds", "long answer", "late image"}
    assert all("tokens exceed the stage's 40; raise " + field in reason for _, reason in skipped(whole))
    assert all(reason.endswith(", or set data.too_long=truncate") for _, reason in skipped(whole))
    assert {key for key, _ in skipped(cut)} == {"long answer", "late image"}
    assert all("shorten it: no answer behind all images ends early enough" in reason for _, reason in skipped(cut))
    assert not any(each.num_truncated for each in whole.batches)
    assert sum(each.num_truncated for each in cut.batches) >= 1


def test_the_named_length_is_enough(tmp_path: Path) -> None:
    """With VTC as well, which rows are shortened by."""
    data = write(tmp_path, "llava_json", [{"id": "a", "conversations": turns(0, "the cat " * 40)}] * 4)
    for vtc in (None, {"keep_ratio": 0.5}):
        [(_, reason), *_] = skipped(first_step(run(data, 48, vtc=vtc)))
        enough = int(reason.split("batch.sequence_length=48 to ")[1].split(",")[0])
        assert skipped(first_step(run(data, enough, vtc=vtc))) == set()
        assert len(skipped(first_step(run(data, enough - 1, vtc=vtc)))) == 1
