"""Writes tensors into a folder of safetensors shards, one shard in memory at a time; an interrupted call goes on where it was.

The shards are planned from sizes alone before any is written, so a shard that exists is the right one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file

from megatron_sts.config.errors import refuse
from megatron_sts.runtime.progress_lines import ProgressLines
from megatron_sts.runtime.stored import INDEX

SETTINGS_NAME = ".conversion.json"
"""What the shards are made of; a call that goes on must match it."""
PARTIAL = ".partial.safetensors"
FORMAT = 1
"""Raised when the same input begins to give other shards."""
SHARD_BYTES = 2 * 2**30


@dataclass(frozen=True)
class Unit:
    """Tensors that are made together."""

    names: tuple[str, ...]
    num_bytes: int
    make: Callable[[], Mapping[str, torch.Tensor]]


def claim(folder: Path, field: str, settings: Mapping[str, Any]) -> None:
    """Make ``folder`` this call's, unless it is another's. ``settings``: what it will hold is made of, as JSON values.

    Raises:
        ConfigError: ``folder``, which the user calls ``field``, holds something else.
    """
    settings = {"format": FORMAT, **settings}
    begun = folder / SETTINGS_NAME
    if begun.exists():
        if json.loads(begun.read_text(encoding="utf-8")) != settings:
            refuse(field, folder, "was begun with other weights, or by another version",
                   "give another folder, or delete this one")  # fmt: skip
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        refuse(field, folder, "neither empty nor begun by this command", "give another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(begun, json.dumps(settings, indent=2) + "\n")


def write_shards(folder: Path, units: Sequence[Unit], shard_bytes: int = SHARD_BYTES) -> bool:
    """Write the tensors of ``units``, then an index of them; False if an earlier call had done all of it.

    ``folder`` is a claimed one. A shard has ``shard_bytes``; one unit may be larger.
    """
    if (folder / INDEX).exists():
        return False
    plan = list(_plan(units, shard_bytes))
    weight_map: dict[str, str] = {}
    done = 0
    with progress(sum(unit.num_bytes for unit in units)) as reached:
        for number, shard in enumerate(plan, start=1):
            name = f"model-{number:05d}-of-{len(plan):05d}.safetensors"
            weight_map |= {tensor: name for unit in shard for tensor in unit.names}
            if not (folder / name).exists():
                _write_shard(folder, name, shard, done, reached)
            done += sum(unit.num_bytes for unit in shard)
    total = sum(unit.num_bytes for unit in units)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomically(folder / INDEX, json.dumps(index, indent=2) + "\n")
    return True


@contextmanager
def progress(num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, or lines; yields what takes the number of bytes that are done."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        shown, lines = bar.add_task("weights", total=num_bytes), ProgressLines(bar, "weights, MiB", num_bytes >> 20)

        def reached(done: int) -> None:
            bar.update(shown, completed=done)
            lines.tell(done >> 20)

        yield reached


def write_atomically(path: Path, text: str) -> None:
    """All of ``text`` or nothing."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _plan(units: Sequence[Unit], shard_bytes: int) -> Iterator[list[Unit]]:
    """Consecutive units of up to ``shard_bytes``."""
    shard: list[Unit] = []
    for unit in units:
        if shard and sum(known.num_bytes for known in shard) + unit.num_bytes > shard_bytes:
            yield shard
            shard = []
        shard.append(unit)
    if shard:
        yield shard


def _write_shard(folder: Path, name: str, shard: Sequence[Unit], done: int, reached: Callable[[int], None]) -> None:
    """``done``: bytes of the shards before it."""
    tensors: dict[str, torch.Tensor] = {}
    for unit in shard:
        made = unit.make()
        assert set(made) == set(unit.names)
        tensors |= made
        done += unit.num_bytes
        reached(done)
    # transformers asks for this mark.
    save_file(tensors, folder / PARTIAL, metadata={"format": "pt"})
    (folder / PARTIAL).replace(folder / name)
