"""``data prepare``: what goes in comes out of the shards, bad entries are listed, and interruptions leave no trace."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from megatron_sts.cli import main
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.prepared import check_prepared, count_prepared
from megatron_sts.data.prepare import _plan, prepare
from megatron_sts.data.shards import WORK_FOLDER
from tests.data.llava_files import NUM_GOOD, bad_entries, good_entries, turns, write_json

UNLIKE = {"index.sqlite"}
"""Energon's index holds rows in the order in which its workers found them."""


def contents(out: Path) -> dict[str, bytes]:
    """Every file of a prepared folder that must not differ from run to run."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name not in UNLIKE)
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def samples(out: Path) -> list[dict[str, Any]]:
    """What webdataset, which knows nothing of this project, reads back."""
    shards = sorted(str(path) for path in out.glob("*.tar"))
    return list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSON of good entries with the bad ones between them; its folder holds the pictures."""
    folder = tmp_path_factory.mktemp("source")
    good, bad = good_entries(folder), [entry for entry, _ in bad_entries(folder).values()]
    return write_json(folder / "llava.json", good[:20] + bad + good[20:])


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "out"
    summary = prepare(source, source.parent, out, shard_size_mb=1, num_workers=2)
    assert summary.num_samples == NUM_GOOD
    return out


def test_shards_hold_the_good_entries_and_the_bytes_of_their_pictures(source: Path, prepared: Path) -> None:
    good = {entry["id"]: entry for entry in json.loads(source.read_text()) if "good-" in str(entry)}
    found = samples(prepared)
    assert [json.loads(sample["json"])["id"] for sample in found] == list(good)
    for sample in found:
        text = json.loads(sample["json"])
        entry = good[text["id"]]
        assert text == {"id": entry["id"], "conversations": entry["conversations"]}
        names = [entry["image"]] if "image" in entry else entry.get("images", [])
        pictures = {key: value for key, value in sample.items() if key != "json" and not key.startswith("__")}
        wanted = {f"{n}{Path(name).suffix}": (source.parent / name).read_bytes() for n, name in enumerate(names)}
        assert pictures == wanted


def test_each_bad_entry_is_listed_with_its_reason(source: Path, prepared: Path) -> None:
    entries, bad = json.loads(source.read_text()), bad_entries(source.parent)
    rejected = [json.loads(line) for line in (prepared / "rejected.jsonl").read_text().splitlines()]
    assert [entries[entry["number"]] for entry in rejected] == [entry for entry, _ in bad.values()]
    for entry, (id, (_, reason)) in zip(rejected, bad.items(), strict=True):
        assert entry["id"] in (id, f"number {entry['number']}")
        assert entry["reason"] == reason, id
    details = {entry["id"]: entry["detail"] for entry in rejected}
    assert "gone.jpg: No such file" in details["missing"] and "truncated" in details["truncated"]
    assert details["two-markers"] == "2 <image> markers but 1 images; write one marker for each image"


def test_count_is_energons(prepared: Path) -> None:
    from megatron.energon import WorkerConfig, load_dataset

    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    [loaded] = load_dataset(prepared).get_datasets(training=True, split_part="train", worker_config=config).datasets
    assert count_prepared(prepared) == len(loaded.dataset) == NUM_GOOD


def test_count_leaves_out_other_splits_and_excluded_shards(tmp_path: Path) -> None:
    folder = tmp_path / ".nv-meta"
    folder.mkdir()
    (folder / "dataset.yaml").write_text("{}")
    counts = {f"shard-{n}.tar": 10**n for n in range(4)}
    (folder / ".info.json").write_text(json.dumps({"energon_version": "7", "shard_counts": counts}))
    (folder / "split.yaml").write_text(
        "split_parts: {train: ['shard-{0..2}.tar'], val: [shard-3.tar]}\nexclude: [shard-1.tar]"
    )
    assert count_prepared(tmp_path) == 1 + 100


def test_what_has_no_epoch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path=.*: not a prepared dataset; .*megatron-sts data prepare"):
        count_prepared(tmp_path)
    blend = tmp_path / "blend.yaml"
    blend.write_text("{}")
    check_prepared(blend)
    with pytest.raises(ConfigError, match="give the stage steps instead of epochs"):
        count_prepared(blend)


def test_workers_and_repetition_change_no_byte(source: Path, prepared: Path, tmp_path: Path) -> None:
    before = contents(prepared)
    prepare(source, source.parent, tmp_path / "again", shard_size_mb=1, num_workers=1)
    assert contents(tmp_path / "again") == before
    stamps = {path: path.stat().st_mtime_ns for path in prepared.glob("*.tar")}
    summary = prepare(source, source.parent, prepared, shard_size_mb=1, num_workers=1)
    assert summary.num_samples == NUM_GOOD and contents(prepared) == before
    assert stamps == {path: path.stat().st_mtime_ns for path in prepared.glob("*.tar")}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A JSON whose pictures fill three shards and more, and what became of it in one go."""
    folder = tmp_path_factory.mktemp("large")
    for number in range(8):
        Image.effect_noise((640, 640), 100).save(folder / f"{number}.png")
    entries = [{"id": str(number), "image": f"{number}.png", "conversations": turns(1)} for number in range(8)]
    source = write_json(folder / "llava.json", [*entries[:3], {"id": "bad", "conversations": []}, *entries[3:]])
    prepare(source, folder, folder / "whole", shard_size_mb=1, num_workers=1)
    return source, contents(folder / "whole")


@pytest.mark.parametrize("count", [2, 5])
def test_parts_make_the_same_dataset(
    large: tuple[Path, dict[str, bytes]], tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Byte for byte, whatever their number and order, also with more parts than shards."""
    source, whole = large
    out, merging = tmp_path / "out", ["data", "merge", "--out", str(tmp_path / "out"), "--num-workers", "1"]
    assert main(merging) == 2
    assert "no part of a dataset was prepared here" in capsys.readouterr().err
    for number in reversed(range(1, count + 1)):
        words = ["data", "prepare", str(source), "--out", str(out), "--shard-size-mb", "1", "--num-workers", "1"]
        assert main([*words, "--part", f"{number}/{count}"]) == 0
        assert f"part {number} of {count}: " in capsys.readouterr().out
        if number == count:
            assert main(merging) == 2
            told = capsys.readouterr().err
            assert "shards are not written, the first is shard-0" in told and told.count("\n") == 1
    assert main(merging) == 0
    merged = contents(out)
    assert json.loads(merged.pop(f"{WORK_FOLDER}/plan.json"))["num_shards"] > 2
    assert merged == whole


NUM_SLOW = 48


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen shards of 1 MiB, mostly text; the picture takes some 25 ms to decode, so that a run can be hit."""
    folder = tmp_path_factory.mktemp("slow")
    Image.new("RGB", (1600, 1600)).save(folder / "large.png")
    entries = [
        {"id": str(n), "image": "large.png", "conversations": turns(1, "long " * 60_000)} for n in range(NUM_SLOW)
    ]
    return write_json(folder / "slow.json", entries)


def start(source: Path, out: Path) -> subprocess.Popen[bytes]:
    words = ["data", "prepare", source, "--out", out, "--shard-size-mb", "1", "--num-workers", "1"]
    return subprocess.Popen(
        [sys.executable, "-m", "megatron_sts", *map(str, words)],
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_run_goes_on(stop: signal.Signals, slow_source: Path, tmp_path: Path) -> None:
    source, out = slow_source, tmp_path / "out"
    process = start(source, out)
    while not (out / WORK_FOLDER / "000000.json").exists():
        assert process.poll() is None
        time.sleep(0.001)
    children = psutil.Process(process.pid).children(recursive=True)
    # SIGKILL of the parent alone is what a batch system's out-of-memory killer does; Ctrl-C reaches the whole group.
    os.kill(process.pid, stop) if stop == signal.SIGKILL else os.killpg(process.pid, stop)
    assert process.wait() == (130 if stop == signal.SIGINT else -signal.SIGKILL)
    assert psutil.wait_procs(children, timeout=30)[1] == []
    assert not (out / ".nv-meta").exists()
    done = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert 1 <= len(done) < NUM_SLOW // 3
    assert start(source, out).wait() == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done
    prepare(source, source.parent, tmp_path / "whole", shard_size_mb=1, num_workers=2)
    assert contents(out) == contents(tmp_path / "whole")
    assert len(samples(out)) == NUM_SLOW


def test_index_that_was_not_finished_is_made_again(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(source, source.parent, out, shard_size_mb=1, num_workers=1)
    before = contents(out)
    (out / ".nv-meta" / "dataset.yaml").unlink()
    (out / ".nv-meta" / "split.yaml").unlink()
    (out / ".nv-meta" / "index.sqlite").write_bytes(b"half")
    prepare(source, source.parent, out, shard_size_mb=1, num_workers=1)
    assert contents(out) == before


def test_another_input_is_refused(tmp_path: Path) -> None:
    folder, out = tmp_path / "source", tmp_path / "out"
    entries = good_entries(folder, 3)
    source = write_json(folder / "llava.json", entries)
    prepare(source, folder, out, shard_size_mb=1, num_workers=1)
    with pytest.raises(ConfigError, match=r"--out=.*: was begun with --shard-size-mb=1, not 2; give another folder"):
        prepare(source, folder, out, shard_size_mb=2, num_workers=1)
    write_json(source, entries[:2])
    with pytest.raises(ConfigError, match="was begun with another JSON file"):
        prepare(source, folder, out, shard_size_mb=1, num_workers=1)
    write_json(source, entries)
    (folder / "good" / "2.jpg").unlink()
    with pytest.raises(ConfigError, match="was begun with other pictures"):
        prepare(source, folder, out, shard_size_mb=1, num_workers=1)


def test_a_missing_picture_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "samples.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"--images=.*nowhere: no such folder"):
        prepare(tmp_path / "samples.json", tmp_path / "nowhere", tmp_path / "out", 1, 1)


def test_foreign_folder_is_refused(tmp_path: Path) -> None:
    source = write_json(tmp_path / "source" / "llava.json", good_entries(tmp_path / "source", 1))
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("...")
    with pytest.raises(ConfigError, match="neither empty nor begun by this command"):
        prepare(source, source.parent, out, shard_size_mb=1, num_workers=1)


def test_json_lines(tmp_path: Path) -> None:
    entries = good_entries(tmp_path, 3)
    source = tmp_path / "llava.jsonl"
    source.write_text("\n".join([*map(json.dumps, entries), "{broken", ""]))
    summary = prepare(source, tmp_path, tmp_path / "out", shard_size_mb=1, num_workers=1)
    assert (summary.num_samples, summary.rejected) == (3, Counter({"malformed entry": 1}))
    assert [json.loads(sample["json"])["id"] for sample in samples(tmp_path / "out")] == [e["id"] for e in entries]


@pytest.mark.parametrize(
    ("text", "said"),
    [("[1,", "not valid JSON"), (None, "not readable"), ("3", "3, not samples; give a list of samples")],
)
def test_unreadable_source(text: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if text is not None:
        (tmp_path / "llava.json").write_text(text)
    assert main(["data", "prepare", str(tmp_path / "llava.json"), "--out", str(tmp_path / "out")]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_command_prints_a_summary(source: Path, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--images", str(source.parent), "--out", str(prepared), "--shard-size-mb", "1"]
    assert main(["data", "prepare", str(source), *words]) == 0
    out, err = capsys.readouterr()
    printed = " ".join(out.split())
    assert f"{NUM_GOOD} samples in 1 shards" in printed and "Rejected: 19" in printed
    warning = err.splitlines()[-1]
    assert warning.startswith(f"megatron-sts: warning: 19 of {NUM_GOOD + 19} entries were rejected; ")
    assert " name pictures that are not below the folder that --images gives" in warning
    assert "2 │ corrupt picture" in printed and "rejected.jsonl" in printed


def test_nothing_left_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_json(tmp_path / "llava.json", [entry for entry, _ in bad_entries(tmp_path).values()])
    assert main(["data", "prepare", str(source), "--out", str(tmp_path / "out"), "--num-workers", "1"]) == 1
    assert (
        capsys.readouterr().err.splitlines()[-1] == f"megatron-sts: error: {source}: none of its 19 entries can be used"
    )


@given(st.lists(st.lists(st.integers(-1, 50), max_size=3), max_size=30), st.integers(1, 200))
def test_plan_covers_all_entries_and_fills_shards(sizes: list[list[int]], shard_bytes: int) -> None:
    entries = ["x" * 10] * len(sizes)  # 12 bytes of JSON
    ranges = list(_plan(entries, sizes, shard_bytes))
    assert [n for start, stop in ranges for n in range(start, stop)] == list(range(len(sizes)))
    filled = [sum(12 + sum(sizes[n]) for n in range(start, stop)) for start, stop in ranges]
    for (start, stop), size in zip(ranges, filled, strict=True):
        assert size <= shard_bytes or stop - start == 1
    for size, (next_start, _) in zip(filled, ranges[1:], strict=False):
        assert size + 12 + sum(sizes[next_start]) > shard_bytes  # the next entry would not have fitted


def test_lines_end_at_line_feeds_only_and_broken_text_is_rejected(tmp_path: Path) -> None:
    source = tmp_path / "llava.jsonl"
    whole = {"id": "a", "conversations": turns(0, "one\u2028two\x85three")}
    broken = {"id": "b\ud83d", "conversations": turns(0, "half a pair \ud83d")}
    source.write_text(json.dumps(whole, ensure_ascii=False) + "\n" + json.dumps(broken) + "\n", encoding="utf-8")
    summary = prepare(source, tmp_path, tmp_path / "out", shard_size_mb=1, num_workers=1)
    assert (summary.num_samples, summary.rejected) == (1, Counter({"malformed entry": 1}))
    assert json.loads(samples(tmp_path / "out")[0]["json"])["conversations"] == whole["conversations"]
