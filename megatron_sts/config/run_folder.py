"""Where a run's folder keeps its config and its checkpoints. Torch-free; knows nothing of what is in them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import yaml

from megatron_sts.config.errors import ConfigError

CONFIG = "config.resolved.yaml"
CHECKPOINTS = "checkpoints"
COMPLETE = "progress.json"
"""Written last, into a folder that is then renamed: a checkpoint with this file is whole."""
STATE = "state"
"""Inside a checkpoint: what megatron-core wrote."""


DATA = "data"
"""Inside a checkpoint: the place in the data, a file for each rank that reads."""
MANIFEST = "integrity.json"
"""In a checkpoint, or in its ``state`` if an earlier version wrote it: digests of its files."""
BROKEN_PREFIX = "broken-"
"""Of the name of a checkpoint that was set aside: it is not whole, or not as it was written."""
SUSPECT_PREFIX = "suspect-"
"""Of the name of one that is as it was written, but may hold what went wrong before: ranks that differed, a loss that leapt again."""
BEST = "best"
"""RUN_DIR/checkpoints/STAGE/best: the stage's checkpoint with the lowest validation loss. There is no such file."""
LOSS = "validation_loss"
"""In a checkpoint's progress."""
_NAME = re.compile(r"\d+-.+-\d+")


def whole_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted((path.parent for path in folder.glob(f"*/{COMPLETE}") if _is_named(path.parent)), key=position)


def partial_checkpoints(folder: Path) -> list[Path]:
    """Folders that have a checkpoint's name and are none: a copy that was cut off, a deletion that was."""
    named = (path for path in folder.glob("*") if path.is_dir() and _is_named(path))
    return sorted((path for path in named if not (path / COMPLETE).is_file()), key=position)


def manifest_of(checkpoint: Path) -> Path:
    """Where a checkpoint's manifest is, or should be."""
    earlier = checkpoint / STATE / MANIFEST
    return earlier if earlier.is_file() and not (checkpoint / MANIFEST).is_file() else checkpoint / MANIFEST


def set_aside(checkpoint: Path, prefix: str = BROKEN_PREFIX) -> Path:
    """Renames a folder so that no run goes on from it or meets it; where it is now.

    Raises:
        OSError: it cannot be renamed.
    """
    name = f"{prefix}{checkpoint.name}"
    names = (checkpoint.with_name(f"{name}.{number}" if number > 1 else name) for number in count(1))
    return checkpoint.rename(next(path for path in names if not path.exists()))


def _is_named(path: Path) -> bool:
    return _NAME.fullmatch(path.name) is not None


def position(checkpoint: Path) -> tuple[int, int]:
    """A checkpoint's stage and step, by its name."""
    return int(checkpoint.name.split("-", 1)[0]), int(checkpoint.name.rsplit("-", 1)[1])


def stage_of(checkpoint: Path) -> str:
    """The name of a checkpoint's stage, by its own."""
    return checkpoint.name.split("-", 1)[1].rsplit("-", 1)[0]


def validation_loss(checkpoint: Path) -> float | None:
    """Of a checkpoint's weights; None: not known, or its progress is damaged."""
    try:
        found = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))[LOSS]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found if isinstance(found, float) and math.isfinite(found) else None


def best_checkpoints(checkpoints: Sequence[Path], count: int) -> list[Path]:
    """Of each stage so many with the lowest validation losses, the best one first; the earlier of two with the same."""
    known = [(loss, path) for path in checkpoints if (loss := validation_loss(path)) is not None]
    stages = dict.fromkeys(position(path)[0] for path in checkpoints)
    of_stages = [[each for each in known if position(each[1])[0] == stage] for stage in stages]
    ranked = (sorted(found, key=lambda each: (each[0], position(each[1]))) for found in of_stages)
    return [path for found in ranked for _, path in found[:count]]


def is_of_run(path: Path) -> bool:
    """Whether ``path`` is one that ``checkpoint_of`` looks into."""
    return (path / COMPLETE).is_file() or (path / CONFIG).is_file() or _is_stage(path) or _is_best(path)


def checkpoint_of(path: Path) -> Path:
    """A checkpoint itself, the newest whole one of a run, the one of a stage's end: RUN_DIR/checkpoints/STAGE, or the stage's best
    one: RUN_DIR/checkpoints/STAGE/best.

    Raises:
        ConfigError: ``path`` is none of these.
    """
    if (path / COMPLETE).is_file():
        return path
    if _is_stage(path):
        return _end_of_stage(path)
    if _is_best(path):
        return _best_of_stage(path)
    if not (path / CONFIG).is_file():
        raise ConfigError(f"{path}: neither a run's folder nor a checkpoint in one")
    checkpoints = whole_checkpoints(path / CHECKPOINTS)
    if not checkpoints:
        raise ConfigError(f"{path}: the run has no checkpoint yet; let it train on")
    return checkpoints[-1]


def config_of(path: Path) -> Path:
    """The config file of a run, or of the one that a checkpoint belongs to, whether or not that is still there.

    Raises:
        ConfigError: the checkpoint was moved out of its run.
    """
    if (path / CONFIG).is_file():
        return path / CONFIG
    config = (path.absolute().parent if _is_best(path) else path).resolve().parents[1] / CONFIG
    if not config.is_file():
        raise ConfigError(f"{path}: no {CONFIG} two folders above it; leave checkpoints in their run's folder")
    return config


def _is_stage(path: Path) -> bool:
    folder = path.absolute().parent
    return folder.name == CHECKPOINTS and (folder.parent / CONFIG).is_file() and not path.exists()


def _is_best(path: Path) -> bool:
    return path.name == BEST and _is_stage(path.absolute().parent)


def _numbers(path: Path) -> tuple[int, int]:
    """Index and number of steps of the stage that ``path`` names."""
    stages = yaml.safe_load(config_of(path).read_text(encoding="utf-8"))["resolved"]["stages"]
    numbers = {stage["name"]: (stage["index"], stage["num_steps"]) for stage in stages}
    if path.name not in numbers:
        raise ConfigError(f"{path}: that run has no such stage; choose from {', '.join(numbers)}, or give a checkpoint")
    return numbers[path.name]


def _best_of_stage(path: Path) -> Path:
    """The checkpoint with the lowest validation loss of the stage that ``path``'s folder names."""
    index, _ = _numbers(path.parent)
    of_stage = [each for each in whole_checkpoints(path.parents[1]) if position(each)[0] == index]
    if not (best := best_checkpoints(of_stage, 1)):
        raise ConfigError(
            f"{path}: none of the stage's {len(of_stage)} checkpoints has a validation loss; give one of them, or set "
            f"stages.{path.parent.name}.validation.interval_steps and checkpoint.keep_best next time"
        )
    return best[0]


def _end_of_stage(path: Path) -> Path:
    """The checkpoint of the end of the stage that ``path`` names."""
    found = whole_checkpoints(path.parent)
    index, num_steps = _numbers(path)
    name = f"{index}-{path.name}-{num_steps:07d}"
    if path.with_name(name) not in found:
        names = ", ".join(checkpoint.name for checkpoint in found) or "none"
        raise ConfigError(
            f"{path}: the end of that stage, {name}, is not among the run's checkpoints ({names}); give one of these, let "
            "the run train on, or keep more of them next time (checkpoint.keep_last)"
        )
    return path.with_name(name)
