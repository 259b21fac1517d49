"""A sweep file: one config, trained with every combination of cases, grid values and seeds. Torch-free."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError

from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.config.explain import explain
from megatron_sts.config.section import Section

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")]


class Sweep(Section):
    """What a sweep file may hold."""

    config: str
    """The config of all runs: a YAML file or a folder with one, relative to the sweep's file."""
    overrides: tuple[str, ...] = ()
    """``key.path=value`` of every run."""
    cases: dict[Name, tuple[str, ...]] = Field(default_factory=dict, validate_default=False)
    """Named lists of overrides, one of which each run has. None: a run has none."""
    grid: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(default_factory=dict)
    """Keys of the config with the values that they take; every combination is run."""
    seeds: tuple[Annotated[int, Field(ge=0, lt=2**63)], ...] = ()
    """Of each combination a run a seed. None: the config's own seed."""


class SweepRun(Section):
    """One run of a sweep."""

    name: str
    """Its folder's."""
    case: str | None
    values: dict[str, Any]
    """Of the grid's keys."""
    seed: int | None
    overrides: tuple[str, ...]
    """All of them, in order: the sweep's, the case's, the grid's, the seed."""


def read(path: Path) -> Sweep:
    """A sweep file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        written = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        return Sweep.model_validate(written)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give a sweep's YAML file") from None
    except ValidationError as error:
        said = explain(error, written, Sweep)
        raise ConfigError(f"{path}: {said}; a sweep has the keys {', '.join(Sweep.model_fields)}") from None
    except (OSError, yaml.YAMLError, ValueError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: not readable ({' '.join(str(error).split())}); correct the file") from None


def config_of(sweep: Sweep, path: Path) -> Path:
    """The config of a sweep in the file ``path``."""
    return Path(sweep.config) if Path(sweep.config).is_absolute() else path.parent / sweep.config


def runs_of(sweep: Sweep) -> tuple[SweepRun, ...]:
    """All runs, the seed changing fastest, then the grid's last key.

    Raises:
        ConfigError: two of them are the same.
    """
    short = _short_names(list(sweep.grid))
    found: dict[str, SweepRun] = {}
    for case, values, seed in product(sweep.cases or (None,), product(*sweep.grid.values()), sweep.seeds or (None,)):
        chosen = dict(zip(sweep.grid, values, strict=True))
        words = [f"{key}={_written(value)}" for key, value in chosen.items()]
        parts = [case, *(f"{short[key]}={_plain(value)}" for key, value in chosen.items())]
        if seed is not None:
            words.append(f"seed={seed}")
            parts.append(f"seed={seed}")
        name = "-".join(part for part in parts if part is not None) or "run"
        if name in found:
            refuse("sweep", name, "two runs of the sweep have this name", "list each value and seed once")
        overrides = (*sweep.overrides, *(sweep.cases[case] if case else ()), *words)
        found[name] = SweepRun(name=name, case=case, values=chosen, seed=seed, overrides=overrides)
    return tuple(found.values())


def _short_names(keys: list[str]) -> dict[str, str]:
    """The shortest ends of dotted keys that tell them apart."""
    short = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[-n:]) for n in range(1, len(parts) + 1))
        short[key] = next(end for end in ends if sum(f".{other}".endswith(f".{end}") for other in keys) == 1)
    return short


def _written(value: Any) -> str:
    """As an override has it."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=10**6)).removesuffix("\n...\n").strip()


def _plain(value: Any) -> str:
    """As a folder's name has it."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", _written(value)).strip("_")
