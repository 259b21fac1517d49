"""What a folder of shards says of itself: one that ``megatron-sts data prepare`` wrote, or others with Energon's own command.

Torch-free; reads Energon's files, not Energon.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from braceexpand import braceexpand

from megatron_sts.config.errors import refuse

ENERGON_FOLDER = ".nv-meta"
"""In a dataset's folder: what Energon knows of it."""
SETTINGS_NAME = "prepare.json"
"""In a dataset's folder: what ``megatron-sts data prepare`` made the shards of."""
CRUDE = "CrudeWebdataset"
"""Energon's class of datasets whose samples are files, which is what we read."""
FUNCTIONS = ("part_filter", "sample_loader", "joiner")
"""Keys whose text Energon takes for a function in a file beside it."""
BLEND_SUFFIXES = (".yaml", ".yml")


def check_prepared(path: Path) -> None:
    """Refuses what is neither a folder of shards with Energon's index nor a YAML file that blends some."""
    if path.suffix in BLEND_SUFFIXES and path.is_file():
        read_yaml(path, path)
        return
    folder = path / ENERGON_FOLDER
    if not (folder / "dataset.yaml").is_file():
        if (folder / "split.yaml").is_file() or (folder / "split.json").is_file():
            refuse(
                "data.path",
                path,
                f"has no {ENERGON_FOLDER}/dataset.yaml",
                f"energon prepare writes it with --sample-type {CRUDE}",
            )
        refuse("data.path", path, "not a prepared dataset", "write one with megatron-sts data prepare")


def count_prepared(path: Path) -> int:
    """Training samples of a prepared folder.

    Raises:
        ConfigError: ``path`` is not one, has none, or is a blend, which has no epoch.
    """
    check_prepared(path)
    if path.is_file():
        refuse("data.path", path, "a blend of datasets has no epoch", "give the stage steps instead of epochs")
    return sum(shard_counts(path).values())


def shard_counts(folder: Path, split_part: str = "train", split_config: str = "split.yaml") -> dict[str, int]:
    """Samples in each shard of a split.

    Raises:
        ConfigError: there is no shard in it, or Energon's files do not say.
    """
    parts, counts = shards_by_split(folder, split_config), all_shard_counts(folder)
    names = parts.get(split_part, set())
    if not names:
        found = ", ".join(f"{len(names)} in {part}" for part, names in parts.items() if names) or "none"
        remedy = f"list some in {ENERGON_FOLDER}/{split_config}, or prepare it anew with --split-ratio 1,0,0"
        refuse("data.path", folder, f"no shard is in split {split_part} ({found})", remedy)
    if unknown := sorted(names - set(counts)):
        refuse(
            "data.path",
            folder,
            f"{unknown[0]} of split {split_part} is not in its index",
            "energon prepare writes it anew",
        )
    return {name: counts[name] for name in sorted(names)}


def shards_by_split(folder: Path, split_config: str = "split.yaml") -> dict[str, set[str]]:
    """Names of the shards in each split.

    Raises:
        ConfigError: Energon's file does not say.
    """
    split = _split(folder, split_config)
    try:
        excluded = _expanded(split.get("exclude") or ())
        return {part: _expanded(patterns) - excluded for part, patterns in split["split_parts"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        refuse(
            "data.path",
            folder,
            f"{split_config} is damaged ({type(error).__name__}: {error})",
            "energon prepare writes it anew",
        )


def all_shard_counts(folder: Path) -> dict[str, int]:
    """Samples in each shard, in the order in which Energon's index numbers them.

    Raises:
        ConfigError: Energon's file does not say.
    """
    meta = folder / ENERGON_FOLDER
    info = next((meta / name for name in (".info.json", ".info.yaml") if (meta / name).is_file()), meta / ".info.json")
    try:
        return {str(name): int(count) for name, count in read_yaml(info, folder)["shard_counts"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        refuse(
            "data.path",
            folder,
            f"{info.name} is damaged ({type(error).__name__}: {error})",
            "energon prepare writes it anew",
        )


def excluded_samples(folder: Path, split_config: str = "split.yaml") -> set[str]:
    """SHARD/KEY of samples that a split leaves out."""
    return {name for name in _expanded(_split(folder, split_config).get("exclude") or ()) if "/" in name}


def _split(folder: Path, split_config: str) -> Any:
    meta = folder / ENERGON_FOLDER
    if split_config == "split.yaml" and not (meta / split_config).exists() and (meta / "split.json").is_file():
        split_config = "split.json"
    return read_yaml(meta / split_config, folder)


def read_yaml(file: Path, path: Path) -> Any:
    """A YAML or JSON file of the dataset at ``path``.

    Raises:
        ConfigError: it is not readable.
    """
    try:
        text = file.read_text(encoding="utf-8")
        return json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        refuse("data.path", path, f"{file} is not readable ({error.strerror})", "energon prepare writes it anew")
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind = "JSON" if file.suffix == ".json" else "YAML"
        refuse("data.path", path, f"not valid {kind} ({file.name}: {' '.join(str(error).split())})", "correct the file")


def check_code(path: Path, file: Path, written: Any) -> None:
    """Refuses what ``file`` of the dataset at ``path`` says if Energon would import and call what it names.

    Whose class a dataset or a blend is stands at the top, and is another check's.
    """
    for key in _keys_of_code(written, is_top=True):
        refuse("data.path", path, f"{file.name} names code to be run ({key})", "remove that; data are only read")


def _keys_of_code(written: Any, *, is_top: bool) -> Iterator[str]:
    if isinstance(written, list):
        for value in written:
            yield from _keys_of_code(value, is_top=False)
    for key, value in written.items() if isinstance(written, dict) else ():
        is_class = key in ("__module__", "__class__") and not is_top
        if is_class or key == "__function__" or (key in FUNCTIONS and isinstance(value, str)):
            yield f"{key}: {value}"
        yield from _keys_of_code(value, is_top=False)


def _expanded(patterns: Any) -> set[str]:
    return {name for pattern in patterns for name in braceexpand(pattern)}
