"""Can the shards of a dataset be trained on: whole, with the files that a sample needs, enough for every reader.

Torch-free; reads Energon's index, not Energon, and no shard.
"""

from __future__ import annotations

import math
import sqlite3
import struct
from contextlib import closing
from pathlib import Path

from megatron_sts.config.blend import ENERGON, Member, members
from megatron_sts.config.errors import refuse
from megatron_sts.config.prepared import (
    CRUDE,
    ENERGON_FOLDER,
    all_shard_counts,
    check_code,
    check_prepared,
    excluded_samples,
    read_yaml,
    shard_counts,
)

TEXT = "json"
"""The file of a sample that holds its conversation."""
OFFSET = struct.Struct("<Q")
"""Of Energon's ``SHARD.idx``: where each sample begins in the shard, and where the last one ends."""


def check_stored(path: Path, num_readers: int, split_part: str = "train") -> None:
    """Every dataset of a split that ``path`` names can be read by so many readers (data-parallel ranks x data.num_workers).

    Raises:
        ConfigError: naming the folder or shard, what is wrong, and what to do.
    """
    check_prepared(path)
    for member in members(path, split_part):
        check_prepared(member.folder)
        _check_class(member)
        counts = shard_counts(member.folder, member.split_part, member.split_config)
        for name, count in counts.items():
            _check_shard(member.folder / name, count)
        _check_fields(member, counts)
        check_share(member.folder, member.num_kept(sum(counts.values())), num_readers, member.repetitions)


def count_stored(path: Path, split_part: str) -> int:
    """Samples in a split of all datasets that ``path`` names, each counted once.

    Raises:
        ConfigError: a dataset has no such split, or does not say.
    """
    found = members(path, split_part)
    counts = [sum(shard_counts(each.folder, each.split_part, each.split_config).values()) for each in found]
    return sum(member.num_kept(count) for member, count in zip(found, counts, strict=True))


def check_share(path: Path, num_samples: int, num_readers: int, repetitions: float | None) -> None:
    """Every reader gets a sample: one without any fails, or distorts the blend.

    Raises:
        ConfigError: the dataset at ``path`` has too few.
    """
    readers = f"{num_readers} readers (data-parallel ranks x data.num_workers)"
    share = num_samples // num_readers
    if not share:
        refuse("data.path", path, f"{num_samples} samples for {readers}", "lower either, or use more samples")
    if repetitions is not None and math.floor(share * repetitions) < 1:
        refuse(
            "data.path",
            path,
            f"repetitions={repetitions:g} of {num_samples} samples leave some of {readers} without any",
            f"raise repetitions to at least {math.ceil(1000 / share) / 1000:g}",
        )


def _check_class(member: Member) -> None:
    written = read_yaml(member.folder / ENERGON_FOLDER / member.dataset_config, member.folder)
    said = written if isinstance(written, dict) else {}
    module, found = said.get("__module__"), said.get("__class__")
    if (module, found) != (ENERGON, CRUDE):
        refuse(
            "data.path",
            member.folder,
            f"its samples are {f"Energon's {found}" if module == ENERGON else f'of {module}.{found}'}, not files",
            f"write __class__: {CRUDE} (and __module__: {ENERGON}) into {ENERGON_FOLDER}/{member.dataset_config}",
        )
    check_code(member.folder, Path(member.dataset_config), written)


def _check_shard(shard: Path, count: int) -> None:
    index = shard.with_name(f"{shard.name}.idx")
    try:
        num_bytes, index_bytes = shard.stat().st_size, index.stat().st_size
        with index.open("rb") as file:
            file.seek(max(index_bytes - OFFSET.size, 0))
            [end] = OFFSET.unpack(file.read(OFFSET.size).ljust(OFFSET.size, b"\0"))
    except OSError as error:
        refuse("data.path", error.filename, str(error.strerror).lower(), "copy the dataset again, or prepare it anew")
    if index_bytes != (count + 1) * OFFSET.size:
        refuse("data.path", index, f"is no index of the shard's {count} samples", "energon prepare writes it anew")
    if num_bytes < end:
        why = f"is cut short: {num_bytes:,} of at least {end:,} bytes"
        refuse("data.path", shard, why, "copy it again, or prepare the dataset anew")


def _check_fields(member: Member, counts: dict[str, int]) -> None:
    """Each sample has its text. Indexes of old versions of Energon do not tell; then each one is skipped when it comes."""
    index = member.folder / ENERGON_FOLDER / "index.sqlite"
    if not index.is_file():
        return
    try:
        with closing(sqlite3.connect(f"{index.resolve().as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            _check_texts(member, counts, database)
    except sqlite3.Error as error:
        if "no such table" not in str(error):
            refuse("data.path", index, f"is damaged ({error})", "energon prepare writes it anew")


def _check_texts(member: Member, counts: dict[str, int], database: sqlite3.Connection) -> None:
    with_text = dict(
        database.execute(
            "SELECT tar_file_id, COUNT(*) FROM sample_parts WHERE part_name = ? GROUP BY tar_file_id", [TEXT]
        )
    )
    numbers = {name: number for number, name in enumerate(all_shard_counts(member.folder))}
    suspects = [name for name, count in counts.items() if with_text.get(numbers[name], 0) < count]
    excluded = excluded_samples(member.folder, member.split_config) if suspects else set()
    lacking: list[tuple[str, str, str]] = []
    for name in suspects:
        found = database.execute(
            "SELECT sample_key, GROUP_CONCAT(part_name, ', ') FROM samples JOIN sample_parts USING (tar_file_id, sample_index) "
            "WHERE tar_file_id = ? GROUP BY sample_index HAVING SUM(part_name = ?) = 0 ORDER BY sample_index",
            [numbers[name], TEXT],
        )
        lacking += [(name, key, parts) for key, parts in found if f"{name}/{key}" not in excluded]
    if not lacking:
        return
    shard, key, parts = lacking[0]
    why = f"{len(lacking)} of {sum(counts.values())} samples have no file KEY.{TEXT}; the first, {key} in {shard}, has {_shortened(parts)}"
    remedy = f"write one for each, or exclude SHARD/KEY in {ENERGON_FOLDER}/{member.split_config}"
    if f".{TEXT}" in parts:
        remedy = "Energon ends a sample's key at the first dot: write the shards with names that have no other, as KEY.json and KEY.0.jpg"
    refuse("data.path", member.folder, why, remedy)


def _shortened(parts: str) -> str:
    return parts if len(parts) <= 80 else f"{parts[:80].rsplit(', ', 1)[0]}, ..."
