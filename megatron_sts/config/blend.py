"""The prepared folders that a path names, alone or in Energon Metadataset YAML files. Torch-free; reads Energon's files, not Energon."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sts.config.errors import refuse
from megatron_sts.config.prepared import BLEND_SUFFIXES, check_code, read_yaml, shards_by_split

ENERGON = "megatron.energon"
CLASSES = ("MetadatasetV2", "Metadataset")
"""Energon's classes of blends."""
LISTS = ("blend", "blend_epochized", "datasets")
"""Keys of what is blended."""


@dataclass(frozen=True)
class Member:
    """A folder of shards, as it is read."""

    folder: Path
    split_part: str = "train"
    split_config: str = "split.yaml"
    dataset_config: str = "dataset.yaml"
    repetitions: float | None = None
    """How often each sample is in an epoch of the blend; None: it has no epochs."""
    samples: tuple[int, int | None] = (0, None)
    """Which are read, the end not included; None: all from the first on."""
    share: tuple[float, float] = (0.0, 1.0)
    """Which of these, from 0 to 1."""

    @property
    def is_whole(self) -> bool:
        """Whether all of its samples are read."""
        return self.samples == (0, None) and self.share == (0.0, 1.0)

    def num_kept(self, num_samples: int) -> int:
        """How many of its samples are read, as Energon's ``DatasetSubset`` counts.

        Raises:
            ConfigError: it has no such samples.
        """
        first, end = self.samples[0], num_samples if self.samples[1] is None else self.samples[1]
        if not 0 <= first <= end <= num_samples:
            refuse(
                "data.path", self.folder, f"has {num_samples} samples, no subset [{first}, {end}]", "correct its range"
            )
        begin, stop = (int((end - first) * share) for share in self.share)
        return stop - begin


def members(path: Path, split_part: str = "train") -> list[Member]:
    """The folders of which a split is made; those on other file systems (``s3://...``) are left out.

    Raises:
        ConfigError: a blend is not readable, names itself, has no such split, or has weights that are none.
    """
    return list(_members(Member(path, split_part), ()))


def has_split(path: Path, split_part: str) -> bool:
    """Whether a blend lists datasets for a split, or a folder shards.

    Raises:
        ConfigError: it is not readable.
    """
    if not (path.suffix in BLEND_SUFFIXES and path.is_file()):
        return bool(shards_by_split(path).get(split_part))
    written = read_yaml(path, path)
    splits = written.get("splits") if isinstance(written, dict) else None
    return isinstance(splits, dict) and isinstance(splits.get(split_part), dict)


def _members(member: Member, within: tuple[Path, ...]) -> Iterator[Member]:
    path = member.folder
    if not (path.suffix in BLEND_SUFFIXES and path.is_file()):
        yield member
        return
    if path.resolve() in within:
        refuse("data.path", path, "a blend that names itself", "remove it there")
    written = read_yaml(path, path)
    _check_class(path, written)
    splits = written.get("splits") if isinstance(written, dict) else None
    if not isinstance(splits, dict) or not isinstance(splits.get(member.split_part), dict):
        refuse("data.path", path, f"a blend without splits.{member.split_part}", "list datasets with their paths there")
    yield from _walk(splits[member.split_part], member, (*within, path.resolve()))


def _check_class(path: Path, written: Any) -> None:
    """Energon imports and calls whatever a file names, so that it has to be a blend."""
    said = written if isinstance(written, dict) else {}
    module, name = said.get("__module__", ENERGON), said.get("__class__", CLASSES[0])
    if module != ENERGON or name not in CLASSES:
        why = f"is a {module}.{name}, no blend"
        refuse("data.path", path, why, f"write __module__: {ENERGON} and __class__: {CLASSES[0]}")
    check_code(path, path, written)


def _walk(node: dict[str, Any], around: Member, within: tuple[Path, ...]) -> Iterator[Member]:
    file = around.folder
    if "join" in node:
        refuse("data.path", file, "joins datasets, which is not supported", "blend them, or join their samples' files")
    here = replace(
        narrowed(around, node.get("subset")),
        split_part=node.get("split_part") or around.split_part,
        split_config=node.get("split_config") or around.split_config,
        dataset_config=node.get("dataset_config") or around.dataset_config,
    )
    if isinstance(node.get("path"), str):
        if "://" not in node["path"]:
            yield from _members(replace(here, folder=file.parent / node["path"]), within)
        return
    for key in LISTS:
        parts = [part for part in node.get(key) or () if isinstance(part, dict)]
        weights = [_number(file, part, "weight", 0) for part in parts]
        if key in node and not parts:
            refuse("data.path", file, f"{key} lists no dataset", "list some, each with its path")
        if parts and not any(weights):
            refuse("data.path", file, f"every weight in {key} is 0", "raise one")
        for part in parts:
            repetitions = here.repetitions
            if key == "blend_epochized":
                repetitions = (1.0 if repetitions is None else repetitions) * _number(file, part, "repetitions", 0)
                if not repetitions:
                    refuse(
                        "data.path",
                        file,
                        f"repetitions=0 of {part.get('path')} leave none of it",
                        "raise it or remove the dataset",
                    )
            yield from _walk(part, replace(here, repetitions=repetitions), within)


def narrowed(around: Member, subset: Any) -> Member:
    """The part of ``around`` that a ``subset`` inside it leaves.

    Raises:
        ConfigError: Energon knows no such subset.
    """
    if subset is None:
        return around
    try:
        start, end = map(_bound, subset["range"])
        if around.samples == (0, None) and isinstance(start, int) and not isinstance(end, float):
            return replace(around, samples=(start, end))
        if not (isinstance(start, float) and isinstance(end, float) and 0 <= start <= end <= 1):
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        remedy = "write {range: [START, END]}, two percents, or of one folder two numbers of samples"
        refuse("data.path", around.folder, f"subset={subset} is none that can be read", remedy)
    outer, width = around.share, end - start
    return replace(around, share=(start + outer[0] * width, start + outer[1] * width))


def _bound(written: Any) -> int | float | None:
    """Samples, a share, or None for ``end``."""
    if isinstance(written, int):
        return written
    return None if written == "end" else float(written.removesuffix("%")) / 100


def _number(file: Path, part: dict[str, Any], key: str, least: float) -> float:
    value = part.get(key, 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
        refuse("data.path", file, f"{key}={value} of {part.get('path')} is no number from {least} on", "correct it")
    return float(value)
