"""Config files to ``RunConfig`` and back: YAML, dotted overrides, one-line errors. Torch-free; derives nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.explain import explain, one_line
from megatron_sts.config.resolve import Resolved
from megatron_sts.config.schema import RunConfig

CONFIG_NAME = "config.yaml"
"""The file that a run's folder is named by."""

DERIVED_KEY = "resolved"
"""Top-level key of derived values in a dumped config; ignored when it is read again."""


def load(path: Path, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a config file, or the ``config.yaml`` of a folder, and apply ``key.path=value`` overrides in order.

    Values are YAML. Entries of a list are addressed by index, by their ``name``, or all at once by ``*``:
    ``stages.finetune.lds.alpha=0.3``, ``stages.1.lds.alpha=0.3``, ``stages.*.vtc=null``. ``defaults``: what the file may
    leave out.
    """
    written = _read(path / CONFIG_NAME if path.is_dir() else path)
    if defaults is not None:
        written = OmegaConf.to_container(OmegaConf.merge(defaults, written), resolve=False)  # type: ignore[assignment]
    return parse(written, overrides)


def override(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """The same config, but for ``key.path=value`` overrides; see ``load``."""
    return parse(config.model_dump(mode="json"), overrides)


def parse(written: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """A config as nested dicts and lists, which this changes, with overrides applied; see ``load``."""
    for words in overrides:
        _apply(written, words)
    written.pop(DERIVED_KEY, None)
    try:
        values = OmegaConf.to_container(OmegaConf.create(written), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}; correct the value") from None
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error, values, RunConfig, "write {field}.KEY=VALUE, or leave it out")) from None


def dump(resolved: Resolved, path: Path, **found: Any) -> None:
    """Write the config and, under ``resolved:``, what was derived from it and ``found``. ``load`` reads the file back."""
    derived = (
        resolved.model_dump(mode="json", exclude={"config": True, "stages": {"__all__": {"config", "data"}}}) | found
    )
    written = {**resolved.config.model_dump(mode="json"), DERIVED_KEY: derived}
    if not resolved.is_vision_written:  # with other overrides or ranks the tower may have to run elsewhere
        derived["vision"], written["parallel"]["vision"] = written["parallel"]["vision"], None
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(written)), encoding="utf-8")


def _read(path: Path) -> dict[str, Any]:
    """The file as plain dicts and lists, interpolations untouched."""
    try:
        written = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give a YAML file or a folder that holds {CONFIG_NAME}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({one_line(error)}); correct the file") from None
    except (OSError, ValueError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not readable ({one_line(error)}); correct the file") from None
    if not isinstance(written, dict):
        raise ConfigError(f"{path}: holds a list; a config is a mapping with the keys model and stages")
    return written  # type: ignore[return-value]  # other keys than strings are refused by the schema


def _apply(written: dict[str, Any], override: str) -> None:
    """Set one ``key.path=value`` in place."""
    key, equals, text = override.partition("=")
    if not key or not equals:
        raise ConfigError(f"override {override!r}: not of the form key.path=value; write for example seed=1")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore[index, call-overload]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{key}={text}: not valid YAML ({one_line(error)}); correct or quote the value") from None
    _set(written, key.split("."), value, override)


def _set(node: Any, keys: Sequence[str], value: object, override: str) -> None:
    """Put ``value`` at ``keys`` below ``node``; a missing or null section on the way becomes an empty one."""
    for entry in _matches(node, keys[0], override):
        if len(keys) == 1:
            node[entry] = value
            continue
        if isinstance(node, dict) and node.get(entry) is None:
            node[entry] = {}
        _set(node[entry], keys[1:], value, override)


def _matches(node: Any, key: str, override: str) -> Sequence[str | int]:
    """Keys or indices of ``node`` that one piece of a dotted path means."""
    if isinstance(node, dict):
        return [key]
    if not isinstance(node, list):
        raise ConfigError(f"override {override}: there is nothing below {node!r} to set; shorten the key")
    names = [str(entry.get("name")) if isinstance(entry, dict) else str(entry) for entry in node]
    if key == "*":
        return range(len(node))
    if key in names:
        return [names.index(key)]
    if key.isdecimal() and int(key) < len(node):
        return [int(key)]
    raise ConfigError(f"override {override}: no entry {key!r}; choose from {', '.join(names)}, an index, or *")
