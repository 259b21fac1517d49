"""What a folder that ``megatron-sts data prepare`` wrote says of itself. Torch-free; reads Energon's files, not Energon."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from braceexpand import braceexpand

from megatron_sts.config.errors import refuse

ENERGON_FOLDER = ".nv-meta"
"""In a dataset's folder: what Energon knows of it."""
SETTINGS_NAME = "prepare.json"
"""In a dataset's folder: what ``megatron-sts data prepare`` made the shards of."""
BLEND_SUFFIXES = (".yaml", ".yml")


def check_prepared(path: Path) -> None:
    """Refuses what is neither a prepared folder nor a YAML file that blends some."""
    if path.suffix in BLEND_SUFFIXES and path.is_file():
        try:
            yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            refuse("data.path", path, f"not valid YAML ({' '.join(str(error).split())})", "correct the file")
        return
    if not (path / ENERGON_FOLDER / "dataset.yaml").is_file():
        refuse("data.path", path, "not a prepared dataset", "write one with megatron-sts data prepare")


def count_prepared(path: Path) -> int:
    """Training samples of a prepared folder.

    Raises:
        ConfigError: ``path`` is not one, or is a blend, which has no epoch.
    """
    check_prepared(path)
    if path.is_file():
        refuse("data.path", path, "a blend of datasets has no epoch", "give the stage steps instead of epochs")
    folder = path / ENERGON_FOLDER
    counts: dict[str, int] = json.loads((folder / ".info.json").read_text(encoding="utf-8"))["shard_counts"]
    split = yaml.safe_load((folder / "split.yaml").read_text(encoding="utf-8"))
    excluded = {name for pattern in split.get("exclude", ()) for name in braceexpand(pattern)}
    names = {name for pattern in split["split_parts"]["train"] for name in braceexpand(pattern)}
    return sum(counts[name] for name in names - excluded)
