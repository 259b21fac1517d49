"""What is wrong with the shards of others is said before anything starts, in one line, and what is right is read."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from megatron.energon.metadataset.metadataset_v2 import Subset

from megatron_sts.commands.obstacles import unreadable_data
from megatron_sts.config.blend import Member, narrowed
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.prepared import count_prepared
from megatron_sts.config.stored_samples import check_stored
from megatron_sts.data.energon import EnergonStream
from megatron_sts.data.image import decode_image
from megatron_sts.data.records import ImageSource, Record, SkippedSample, UnreadableDataError
from tests.data.foreign_shards import Files, seen, text, usual, write_class, write_shards
from tests.dist.ladder import BATCH, resolved_run, written_run


def draw(path: Path, count: int, num_workers: int = 0) -> list[Record | SkippedSample]:
    stream = EnergonStream(
        path, seed=0, dp_rank=0, dp_size=1, num_workers=num_workers, shuffle_buffer_size=1, fitting=None
    )
    try:
        return [next(stream) for _ in range(count)]
    finally:
        stream.close()


def said(path: Path, num_readers: int = 1) -> str:
    """The refusal, without what names the folder's place."""
    with pytest.raises(ConfigError) as error:
        check_stored(path, num_readers)
    message = str(error.value)
    assert message.startswith(f"data.path={path.parent}/") and "\n" not in message
    return message.removeprefix(f"data.path={path.parent}/")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty samples of text in one shard."""
    return write_shards(tmp_path_factory.mktemp("good") / "good")


@pytest.fixture
def copied(good: Path, tmp_path: Path) -> Path:
    return shutil.copytree(good, tmp_path / "good")


def test_good_shards_pass(good: Path) -> None:
    check_stored(good, 20)
    assert count_prepared(good) == 20
    assert said(good, 21).startswith("good: 20 samples for 21 readers (data-parallel ranks x data.num_workers)")


def test_the_only_shard_in_split_test(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "one", ratio="8,1,1")
    expected = "one: no shard is in split train (1 in test); list some in .nv-meta/split.yaml, or prepare it anew with --split-ratio 1,0,0"
    assert said(folder) == expected
    with pytest.raises(ConfigError, match="no shard is in split train"):
        count_prepared(folder)


NO_TEXT: dict[str, tuple[Files, str]] = {
    "dotted": (
        lambda number: {f"img.{number}.json": text(number, 0)},
        "1 of 1 samples have no file KEY.json; the first, img in shard-0.tar, has 0000.json, 0001.json",
    ),
    "dotted ends": (
        lambda number: {f"{number}.v2.json": text(number), f"{number}.v2.0.png": b"."},
        "20 of 20 samples have no file KEY.json; the first, 0000 in shard-0.tar, has v2.0.png, v2.json; "
        "Energon ends a sample's key at the first dot: write the shards with names that have no other",
    ),
    "one without": (
        lambda number: {f"{number}.png": b"."} | ({} if number == "0007" else usual(number)),
        "1 of 20 samples have no file KEY.json; the first, 0007 in shard-0.tar, has png; write one for each, or exclude SHARD/KEY",
    ),
    "captions": (lambda number: {f"{number}.txt": b"hello"}, "20 of 20 samples have no file KEY.json"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_samples_without_text_are_named(tmp_path: Path, name: str) -> None:
    files, why = NO_TEXT[name]
    folder = write_shards(tmp_path / "odd", files)
    assert said(folder).startswith(f"odd: {why}")
    if name == "one without":
        # An index that does not tell: the sample is skipped when it comes, and another one is not lost.
        records = draw(folder, 20)
        lost = [record for record in records if isinstance(record, SkippedSample)]
        assert [(record.key, record.reason) for record in lost if record.key == "0007"] == [
            ("0007", "no file KEY.json in its shard")
        ]
        split = folder / ".nv-meta" / "split.yaml"
        split.write_text(split.read_text().replace("exclude: []", "exclude: [shard-0.tar/0007]"))
        check_stored(folder, 1)
        assert "0007" not in {record.key for record in draw(folder, 40)}


def test_pictures_in_webdatasets_habit_and_in_ours(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    endings = ("png", "PNG", "gif")  # which format it is, its bytes say
    single = write_shards(
        tmp_path / "a",
        lambda n: {f"{n}.json": text(n), f"{n}.{endings[int(n)]}": seen(pictures, int(n))},
        num_samples=3,
    )
    several = write_shards(
        tmp_path / "b",
        lambda n: {f"{n}.10.png": seen(pictures, 10), f"{n}.2.png": seen(pictures, 2), f"{n}.json": text(n, 2)},
        num_samples=1,
    )
    for record in draw(single, 3):
        assert isinstance(record, Record)
        [image] = record.images
        [again] = (other() for other in stored(pictures, [int(record.key.removeprefix("s"))]))
        assert (image() == again).all()
    [record] = draw(several, 1)
    assert isinstance(record, Record)
    assert [image().tobytes() for image in record.images] == [p().tobytes() for p in stored(pictures, [2, 10])]


def stored(folder: Path, numbers: list[int]) -> list[ImageSource]:
    return [partial(decode_image, folder / f"{number}.png") for number in numbers]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_shard_cut_short_is_found_at_the_start_and_is_one_line_later(copied: Path, num_workers: int) -> None:
    shard = copied / "shard-0.tar"
    with shard.open("r+b") as file:
        file.truncate(10_000)
    assert said(copied).startswith("good/shard-0.tar: is cut short: 10,000 of at least ")
    with pytest.raises(UnreadableDataError) as error:
        draw(copied, 20, num_workers)
    assert (
        str(error.value) == f"data.path={copied}: reading failed: ValueError: Unexpected end of tar file: shard-0.tar"
    )


def test_damaged_folders_are_named(copied: Path) -> None:
    meta, index = copied / ".nv-meta", copied / "shard-0.tar.idx"
    write_class(copied, "VQAWebdataset")
    assert "its samples are Energon's VQAWebdataset, not files; write __class__: CrudeWebdataset" in said(copied)
    write_class(copied, "CrudeWebdataset")
    sqlite = (meta / "index.sqlite").read_bytes()
    (meta / "index.sqlite").write_bytes(b"half" + sqlite[4:])
    assert "index.sqlite: is damaged (file is not a database)" in said(copied)
    (meta / "index.sqlite").unlink()  # as Energon's old versions had it
    check_stored(copied, 1)
    whole = index.read_bytes()
    index.write_bytes(whole[:-8])
    assert "shard-0.tar.idx: is no index of the shard's 20 samples" in said(copied)
    index.unlink()
    assert "shard-0.tar.idx: no such file or directory; copy the dataset again" in said(copied)
    index.write_bytes(whole)
    (copied / "shard-0.tar").unlink()
    assert "shard-0.tar: no such file or directory; copy the dataset again" in said(copied)
    (meta / "split.yaml").rename(meta / "split.json").write_text('{"split_parts": {"train": ["shard-{0..0}.tar"]}}')
    assert count_prepared(copied) == 20
    (meta / ".info.json").write_text('{"shard_counts": {"other.tar": 3}}')
    assert "good: shard-0.tar of split train is not in its index" in said(copied)
    (meta / ".info.json").write_text("[]")
    assert "good: .info.json is damaged" in said(copied)
    (meta / ".info.json").write_text('{"shard_counts": {}}')
    (meta / "split.yaml").write_text("split_parts: {train: 3}")
    assert "good: split.yaml is damaged" in said(copied)
    (meta / "dataset.yaml").unlink()
    assert "good: has no .nv-meta/dataset.yaml; energon prepare writes it with --sample-type" in said(copied)


def write_blend(path: Path, lines: str, kind: str = "blend") -> Path:
    head = "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n"
    path.write_text(f"{head}    {kind}: {lines}\n")
    return path


BLENDS = {
    ("blend_epochized", "[{repetitions: 0.04, path: good}]"): (
        "good: repetitions=0.04 of 20 samples leave some of 2 readers (data-parallel ranks x data.num_workers) without any; "
        "raise repetitions to at least 0.1"
    ),
    ("blend_epochized", "[{repetitions: 0, path: good}]"): "x.yaml: repetitions=0 of good leave none of it",
    ("blend_epochized", "[{repetitions: -1, path: good}]"): "x.yaml: repetitions=-1 of good is no number from 0 on",
    ("blend_epochized", "[{repetitions: .nan, path: good}]"): "x.yaml: repetitions=nan of good is no number from 0 on",
    (
        "blend_epochized",
        "[{repetitions: 0.2, path: inner.yaml}]",
    ): "good: repetitions=0.08 of 20 samples leave some of 2",
    ("blend", "[{weight: 0, path: good}]"): "x.yaml: every weight in blend is 0; raise one",
    ("blend", "[{weight: many, path: good}]"): "x.yaml: weight=many of good is no number from 0 on",
    ("blend", "[]"): "x.yaml: blend lists no dataset",
    ("blend", "[{path: x.yaml}]"): "x.yaml: a blend that names itself",
    ("blend", "[{path: nowhere}]"): "nowhere: not a prepared dataset",
    ("blend", "[{path: good, split_part: test}]"): "good: no shard is in split test (1 in train)",
}


@pytest.mark.parametrize("blend", BLENDS)
def test_blends_that_cannot_be_read_are_refused_in_one_line(good: Path, blend: tuple[str, str]) -> None:
    kind, lines = blend
    write_blend(good.parent / "inner.yaml", "[{repetitions: 0.4, path: good}]", "blend_epochized")
    path = write_blend(good.parent / "x.yaml", lines, kind)
    assert said(path, 2).startswith(BLENDS[blend])
    if "x.yaml" not in lines:  # Energon asks itself for ever
        with pytest.raises(ConfigError):
            draw(path, 1, num_workers=2)


UNREAD = {
    "path: good\n    subset: {range: [0%, 2%]}": "good: 0 samples for 1 readers",
    "path: good\n    subset: {range: [5, 21]}": "good: has 20 samples, no subset [5, 21]",
    "path: good\n    subset: {absolute_range: [0, 1]}": "x.yaml: subset={'absolute_range': [0, 1]} is none that can be read",
    "path: good\n    subset: {range: [50%, 20%]}": "x.yaml: subset={'range': ['50%', '20%']} is none",
    "path: good\n    subset: {range: [-1%, end]}": "x.yaml: subset={'range': ['-1%', 'end']} is none",
    "path: good\n    subset: all": "x.yaml: subset=all is none",
    "join: [{path: good}, {path: good}]": "x.yaml: joins datasets, which is not supported",
}


@pytest.mark.parametrize("lines", UNREAD)
def test_parts_and_joins_that_cannot_be_read_are_refused(good: Path, lines: str) -> None:
    path = good.parent / "x.yaml"
    path.write_text(f"splits:\n  train:\n    {lines}\n")
    assert said(path).startswith(UNREAD[lines])


def test_what_is_no_blend_is_not_imported(good: Path, copied: Path) -> None:
    path = good.parent / "x.yaml"
    path.write_text("__module__: os\n__class__: system\nsplits: {train: {path: good}}\n")
    assert said(path).startswith("x.yaml: is a os.system, no blend; write __module__: megatron.energon")
    (copied / ".nv-meta" / "dataset.yaml").write_text("__module__: os\n__class__: CrudeWebdataset\n")
    assert "its samples are of os.CrudeWebdataset, not files" in said(copied)


def test_code_that_a_dataset_names_is_not_run(good: Path, copied: Path) -> None:
    """Energon would call it for every file of a sample."""
    marker = copied / "marker"
    (copied / ".nv-meta" / "plant.py").write_text(
        f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n\ndef f(_): ...\n"
    )
    dataset, blend = copied / ".nv-meta" / "dataset.yaml", good.parent / "x.yaml"
    whole = dataset.read_text()
    named = {
        "part_filter: plant.py:f": "part_filter: plant.py:f",
        "part_filter: {__module__: os, __function__: system}": "__module__: os",
        "subflavors: [{x: {__function__: system}}]": "__function__: system",
    }
    for line, key in named.items():
        dataset.write_text(f"{whole}{line}\n")
        assert said(copied).endswith(f"dataset.yaml names code to be run ({key}); remove that; data are only read")
    dataset.write_text(f"{whole}part_filter: [json, jpg]\nsubflavors: {{part: 1}}\n")
    check_stored(copied, 1)
    blend.write_text("splits:\n  train:\n    path: good\n    aux: {a: {__module__: os, __class__: system}}\n")
    assert "x.yaml names code to be run (__module__: os)" in said(blend)
    assert not marker.exists()


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 100)).map(sorted), min_size=1, max_size=3), st.booleans())
@example([[25, 75], [0, 50]], True)
def test_subsets_leave_what_energon_leaves(ranges: list[list[int]], is_absolute: bool) -> None:
    """Nested: the first is the outermost; only the innermost may count samples."""
    written = [{"range": [f"{start}%", f"{end}%"]} for start, end in ranges]
    if is_absolute:
        written.append({"range": [10, "end"]})
    member, theirs = Member(Path("good")), None
    for subset in written:
        member, theirs = narrowed(member, subset), Subset(range=tuple(subset["range"])).merge(theirs)
    assert theirs is not None
    start, end = theirs.compute_subset(173)
    assert member.num_kept(173) == end - start


def test_repetitions_that_leave_each_reader_one_are_read(good: Path) -> None:
    path = write_blend(good.parent / "x.yaml", "[{repetitions: 0.1, path: good}]", "blend_epochized")
    check_stored(path, 2)
    assert len(draw(path, 6, num_workers=2)) == 6


def test_a_dry_run_names_them(copied: Path) -> None:
    stage = {"name": "one", "steps": 1, "batch": {**BATCH, "sequence_length": 96}}
    data = {"source": "energon", "path": str(copied), "num_workers": 3}
    assert list(unreadable_data(resolved_run(written_run(copied, stage) | {"data": data}))) == []
    (copied / "shard-0.tar").write_bytes(b"")
    [found] = unreadable_data(resolved_run(written_run(copied, stage) | {"data": data}))
    assert found.of_this_machine and found.problem.startswith(f"data.path={copied}/shard-0.tar: is cut short")
