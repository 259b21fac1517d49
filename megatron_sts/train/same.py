"""Ranks that would train with different code or configs are found before they do: what differs, and on which rank."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

import megatron_sts
from megatron_sts.config.differences import differences
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.resolve import Resolved
from megatron_sts.runtime.components import ENGINE_LIBRARIES, installed_version

SOURCES = "the sources of megatron_sts"
LIBRARIES = ("megatron-core", "transformer-engine-torch", *ENGINE_LIBRARIES, "apex")
"""Those that compute, beside torch. A library that only reads or writes files may differ."""
NUM_SHOWN = 3


def check_same_code() -> None:
    """Refuses to train with different sources of this package, or versions of the libraries that compute; a collective.

    Raises:
        ConfigError: on every rank, naming what differs and the first rank that has it other than rank 0.
    """
    files = sources(Path(megatron_sts.__file__).parent)
    mine = {SOURCES: digest(files), "torch": str(torch.__version__), "Python": platform.python_version()}
    mine |= {library: installed_version(library) or "none" for library in LIBRARIES}
    found = gathered((os.uname().nodename, mine))
    for rank, (host, others) in enumerate(found):
        first_host, first = found[0]
        for what in [name for name in first if first[name] != others.get(name)]:
            here, there = f"rank 0 ({first_host})", f"rank {rank} ({host})"
            if what == SOURCES:
                names = _shown(differing(*(gathered(files)[number] for number in (0, rank))))
                raise ConfigError(
                    f"{what} differ between {here} and {there}: {names}; start every rank from the same checkout"
                )
            raise ConfigError(
                f"{what} is {first[what]} on {here}, but {others.get(what)} on {there}; install the same on every node"
            )


def check_same_config(resolved: Resolved) -> None:
    """Refuses to train with different configs; a collective.

    Raises:
        ConfigError: on every rank, naming the first field that differs, and whose value.
    """
    mine = resolved.model_dump(mode="json")
    found = gathered((os.uname().nodename, digest({"": repr(mine).encode()})))
    for rank, (host, other) in enumerate(found):
        if other != found[0][1]:
            configs = gathered(mine)
            raise ConfigError(
                _difference(configs[0], configs[rank], f"rank 0 ({found[0][0]})", f"rank {rank} ({host})")
            )


def sources(package: Path) -> dict[str, bytes]:
    """A digest of each Python file of a package, by its path."""
    return {
        str(path.relative_to(package)): hashlib.sha256(path.read_bytes()).digest()[:8]
        for path in sorted(package.rglob("*.py"))
    }


def digest(parts: Mapping[str, bytes]) -> str:
    """Of all of them, with their names."""
    found = hashlib.sha256()
    for name, part in parts.items():
        found.update(name.encode() + b"\0" + part)
    return found.hexdigest()[:16]


def differing(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> list[str]:
    """The names of parts that only one has, or that differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def gathered(value: Any) -> list[Any]:
    """The value of every rank; a collective."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def _difference(one: Mapping[str, Any], other: Mapping[str, Any], here: str, there: str) -> str:
    for section in ("config", *(key for key in one if key != "config")):
        for field, first, second in differences(one.get(section), other.get(section), section):
            name = field.removeprefix("config.")
            return (
                f"{name}={second}: so it is on {there}, but {name}={first} on {here}; start every rank with the same config, "
                "overrides and version"
            )
    return f"the configs of {here} and {there} differ; start every rank with the same config, overrides and version"


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names[:NUM_SHOWN]) + (
        f" and {len(names) - NUM_SHOWN} more files" if len(names) > NUM_SHOWN else ""
    )
