"""The prepared folders that a path names, alone or in Energon Metadataset YAML files. Torch-free; reads Energon's files, not Energon."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sts.config.errors import refuse
from megatron_sts.config.prepared import BLEND_SUFFIXES, read_yaml

LISTS = ("blend", "blend_epochized", "datasets")
"""Keys of what is blended; joined datasets are not ours to read."""


@dataclass(frozen=True)
class Member:
    """A folder of shards, as it is read."""

    folder: Path
    split_part: str = "train"
    split_config: str = "split.yaml"
    dataset_config: str = "dataset.yaml"
    repetitions: float | None = None
    """How often each sample is in an epoch of the blend; None: it has no epochs."""
    is_whole: bool = True
    """Not a subset of its samples."""


def members(path: Path) -> list[Member]:
    """The folders that training reads; those on other file systems (``s3://...``) are left out.

    Raises:
        ConfigError: a blend is not readable, names itself, has no training split, or has weights that are none.
    """
    return list(_members(Member(path), ()))


def _members(member: Member, within: tuple[Path, ...]) -> Iterator[Member]:
    path = member.folder
    if not (path.suffix in BLEND_SUFFIXES and path.is_file()):
        yield member
        return
    if path.resolve() in within:
        refuse("data.path", path, "a blend that names itself", "remove it there")
    written = read_yaml(path, path)
    splits = written.get("splits") if isinstance(written, dict) else None
    if not isinstance(splits, dict) or not isinstance(splits.get(member.split_part), dict):
        refuse("data.path", path, f"a blend without splits.{member.split_part}", "list datasets with their paths there")
    yield from _walk(splits[member.split_part], member, (*within, path.resolve()))


def _walk(node: dict[str, Any], around: Member, within: tuple[Path, ...]) -> Iterator[Member]:
    file = around.folder
    here = replace(
        around,
        split_part=node.get("split_part") or around.split_part,
        split_config=node.get("split_config") or around.split_config,
        dataset_config=node.get("dataset_config") or around.dataset_config,
        is_whole=around.is_whole and node.get("subset") is None,
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


def _number(file: Path, part: dict[str, Any], key: str, least: float) -> float:
    value = part.get(key, 1)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < float("inf"):
        refuse("data.path", file, f"{key}={value} of {part.get('path')} is no number from {least} on", "correct it")
    return float(value)
