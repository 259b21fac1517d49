"""What describes the weights in a weights folder: our ``model`` section and the Hugging Face config it came from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import CONFIG_NAME
from megatron_sts.convert.architectures import import_transformers
from megatron_sts.convert.pairing import Sections
from megatron_sts.convert.shards import write_atomically
from megatron_sts.runtime.stored import INDEX

HF_CONFIG = "hf_config.json"
"""Not config.json: transformers must not take the folder for one of its own."""


def is_weights_folder(path: Path) -> bool:
    """Whether ``path`` is a whole weights folder."""
    return (path / CONFIG_NAME).is_file() and (path / INDEX).is_file()


def write_model(folder: Path, sections: Sections, config: Any) -> None:
    """``config``: of the same model, for transformers."""
    model = {part: section.model_dump(mode="json", exclude_unset=True) for part, section in sections.items()}
    write_atomically(folder / CONFIG_NAME, yaml.safe_dump({"model": model}, sort_keys=False))
    write_atomically(folder / HF_CONFIG, json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")


def read_hf_config(folder: Path) -> Any:
    """The transformers config that a weights folder's model came from.

    Raises:
        ConfigError: it is missing or damaged.
    """
    path = folder / HF_CONFIG
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        return import_transformers().AutoConfig.for_model(written.pop("model_type"), **written)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: missing or damaged ({error}); convert the weights again") from None


def identity(folder: Path) -> str:
    """Tells the files of a folder from others: their names, sizes and times of change."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    said = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
