"""Where a run's folder keeps its config and its checkpoints. Torch-free; knows nothing of what is in them."""

from __future__ import annotations

from pathlib import Path

from megatron_sts.config.errors import ConfigError

CONFIG = "config.resolved.yaml"
CHECKPOINTS = "checkpoints"
COMPLETE = "progress.json"
"""Written last, into a folder that is then renamed: a checkpoint with this file is whole."""
STATE = "state"
"""Inside a checkpoint: what megatron-core wrote."""


def whole_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path.parent for path in folder.glob(f"*/{COMPLETE}") if not path.parent.name.startswith(".")]
    return sorted(found, key=lambda path: (int(path.name.split("-", 1)[0]), int(path.name.rsplit("-", 1)[1])))


def checkpoint_of(path: Path) -> Path:
    """A checkpoint itself, or the newest whole one of a run.

    Raises:
        ConfigError: ``path`` is neither.
    """
    if (path / COMPLETE).is_file():
        return path
    if not (path / CONFIG).is_file():
        raise ConfigError(f"{path}: neither a run's folder nor a checkpoint in one")
    checkpoints = whole_checkpoints(path / CHECKPOINTS)
    if not checkpoints:
        raise ConfigError(f"{path}: the run has no checkpoint yet; let it train on")
    return checkpoints[-1]


def config_of(checkpoint: Path) -> Path:
    """The config file of the run that a checkpoint belongs to.

    Raises:
        ConfigError: the checkpoint was moved out of its run.
    """
    config = checkpoint.resolve().parents[1] / CONFIG
    if not config.is_file():
        raise ConfigError(f"{checkpoint}: no {CONFIG} two folders above it; leave checkpoints in their run's folder")
    return config
