"""Reads a run's folder: its config, its step lines and its evaluation. Knows no page and no figure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.explain import one_line
from megatron_sts.config.load import DERIVED_KEY

METRICS = "metrics.jsonl"
"""In a run's folder."""
Line = dict[str, Any]
"""One line of it."""


@dataclass(frozen=True)
class Run:
    """What a run wrote."""

    folder: Path
    config: dict[str, Any]
    """config.resolved.yaml, with derived values under ``resolved``."""
    steps: dict[str, list[Line]]
    """The step lines of each stage that has any, in order of steps; stages in order of the run."""
    evaluation: dict[str, Any] | None
    skipping: dict[str, Line]
    """For stages with LDS: what was planned, as the event of the stage's last start says."""
    ranks: dict[str, Line]
    """The last ``ranks`` event of each stage that has one."""
    validations: dict[str, list[Line]]
    """The ``validation`` events of each stage that has any, in order of steps."""
    saved: dict[str, int]
    """How many steps of each stage its newest checkpoint held, whether it still is there or not."""

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return int(self.config["model"]["language"]["num_layers"])

    @property
    def is_complete(self) -> bool:
        """Whether every stage has come to its end, whose step always has a line."""
        stages = [entry["name"] for entry in self.config["resolved"]["stages"]]
        return all(name in self.steps and self.steps[name][-1]["step"] + 1 == self.num_steps(name) for name in stages)

    @property
    def was_saved(self) -> bool:
        """Whether it is complete, and its last weights were written."""
        last = self.config["resolved"]["stages"][-1]["name"]
        return self.is_complete and self.saved.get(last) == self.num_steps(last)

    def total(self, field: str, stage: str | None = None) -> float:
        """A field summed over a stage's steps, or all; a step without a line (``logging.interval_steps``) counts as the next one."""
        return float(
            sum(
                (line["step"] - before) * line[field]
                for lines in ([self.steps[stage]] if stage else self.steps.values())
                for before, line in zip([-1, *(line["step"] for line in lines)], lines, strict=False)
            )
        )

    def num_steps(self, stage: str) -> int:
        """Steps that the config gives a stage."""
        names = [entry["name"] for entry in self.config["resolved"]["stages"]]
        return int(self.config["resolved"]["stages"][names.index(stage)]["num_steps"])


def read_run(folder: Path) -> Run:
    """Reads a run's folder.

    Raises:
        ConfigError: it is not the folder of a run, or a file of it is damaged.
    """
    for name in ("config.resolved.yaml", METRICS):
        if not (folder / name).is_file():
            raise ConfigError(f"{folder}: {_why_none(folder, name)}")
    config, metrics, result = (folder / name for name in ("config.resolved.yaml", METRICS, "evaluation.json"))
    try:
        lines = [_parse(text) for text in metrics.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise damaged(metrics, error) from None
    return Run(
        folder=folder,
        config=_config(config),
        steps=_steps(lines),
        evaluation=_whole(result, json.loads, "splits") if result.is_file() else None,
        skipping=_last_events(lines, "skipping"),
        ranks=_last_events(lines, "ranks"),
        validations=_validations(lines),
        saved=_saved(lines),
    )


def _why_none(folder: Path, name: str) -> str:
    """Why it is not the folder of a run, and what to give instead."""
    if folder.is_file():
        return f"is a file; give folders that train wrote, for example {folder.parent}/*/"
    if any(folder.glob("*/config.resolved.yaml")):
        return f"holds runs: give them, for example {folder}/*/"
    return f"holds no {name}; give the folder that train wrote (--run-dir)"


def _whole(path: Path, parse: Callable[[str], Any], *keys: str) -> dict[str, Any]:
    """What a file of the folder says, which has ``keys``."""
    try:
        found = parse(path.read_text(encoding="utf-8"))
    except (ValueError, YAMLError, OmegaConfBaseException) as error:
        raise damaged(path, error) from None
    if not isinstance(found, dict) or not found:
        raise damaged(path, "holds no keys")
    for key in keys:
        if not isinstance(found.get(key), dict):
            raise damaged(path, f"has no {key}")
    return {str(key): value for key, value in found.items()}


def _config(path: Path) -> dict[str, Any]:
    """With all that was derived of its stages."""
    config = _whole(path, lambda text: OmegaConf.to_container(OmegaConf.create(text)))
    check_derived(path, config)
    return config


def check_derived(path: Path, config: Mapping[str, Any]) -> None:
    """Refuses a run's config that does not say how long each of its stages is.

    Raises:
        ConfigError: it is cut off, or not one that ``train`` wrote.
    """
    try:
        told = {stage["name"]: stage["num_steps"] for stage in config[DERIVED_KEY]["stages"]}
        is_whole = [stage["name"] for stage in config["stages"]] == [*told]
    except (TypeError, KeyError):
        is_whole = False
    if not is_whole:
        raise damaged(path, f"{DERIVED_KEY} does not have each stage")


class DamagedError(ConfigError):
    """A file of a run's folder is not whole."""

    def __init__(self, path: Path, why: str) -> None:
        self.problem = f"{path}: is damaged ({why})"
        """Without what to do, which depends on what for."""
        super().__init__(f"{self.problem}; copy it again, or do without this run")


def damaged(path: Path, why: Exception | str) -> DamagedError:
    """What is said of a file of a run's folder that is not whole."""
    return DamagedError(path, why if isinstance(why, str) else one_line(why))


def _last_events(lines: Iterable[Line], event: str) -> dict[str, Line]:
    return {line["stage"]: line for line in lines if line.get("event") == event}


def _steps(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Step lines by stage. A step takes back those after it: they are of a start that crashed, and run again."""
    stages: dict[str, dict[int, Line]] = {}
    for line in lines:
        if "step" in line and "event" not in line:
            found = stages.setdefault(line["stage"], {})
            while found and next(reversed(found)) >= line["step"]:
                found.popitem()
            found[line["step"]] = line
    return {name: list(found.values()) for name, found in stages.items()}


def _validations(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """By stage. A step takes back those of weights from after it, as it does steps."""
    stages: dict[str, dict[int, Line]] = {}
    for line in lines:
        if line.get("event") == "validation":
            stages.setdefault(line["stage"], {})[line["step"]] = line
        elif "step" in line and "event" not in line:
            found = stages.get(line["stage"], {})
            while found and next(reversed(found)) > line["step"]:
                found.popitem()
    return {name: list(found.values()) for name, found in stages.items() if found}


def _saved(lines: Iterable[Line]) -> dict[str, int]:
    """Steps by stage. One that runs again takes back what was saved after it."""
    saved: dict[str, int] = {}
    for line in lines:
        if line.get("event") == "checkpoint":
            saved[line["stage"]] = line["step"]
        elif "step" in line and "event" not in line and line["step"] < saved.get(line["stage"], 0):
            del saved[line["stage"]]
    return saved


def _parse(text: str) -> Line:
    """A line; nothing for one that a crash cut off."""
    try:
        line = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return line if isinstance(line, dict) else {}
