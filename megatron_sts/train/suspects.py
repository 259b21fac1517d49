"""Whole checkpoints that no start should go on from, because what went wrong may be in them already. Torch-free, knows no ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sts.config.run_folder import SUSPECT_PREFIX, position, set_aside, whole_checkpoints

NUM_SHOWN = 4
"""Checkpoints that a line names."""

Position = tuple[int, int]
"""A stage's index, and steps of it that are done: ``run_folder.position`` of a checkpoint."""


@dataclass(frozen=True)
class Suspects:
    """What was done about checkpoints that stopped later than at some position."""

    aside: dict[str, str]
    """New names, by the old ones, oldest first."""
    left: dict[str, str]
    """Why the others could not be renamed, by their names."""
    newest: str | None
    """The one from which the same command goes on."""

    def describe(self) -> str:
        """What a user has to know of it, in words that follow on when all was well."""
        parts = []
        if self.aside:
            verb = "is" if len(self.aside) == 1 else "are"
            names, asides = _shown(list(self.aside)), _shown(list(self.aside.values()))
            parts.append(f"{names} {verb} from after that, and set aside as {asides}")
        for name, why in self.left.items():
            parts.append(f"{name} is from after that, and cannot be renamed ({why}): move it away first")
        way = "starts from the beginning" if self.newest is None else f"goes on from {self.newest}"
        return "; ".join([*(parts or ["no checkpoint is from after that"]), f"the same command {way}"])


def set_aside_after(folder: Path, last: Position) -> Suspects:
    """Renames the whole checkpoints in ``folder`` that stopped later than at ``last``."""
    aside: dict[str, str] = {}
    left: dict[str, str] = {}
    good: list[str] = []
    for path in whole_checkpoints(folder):
        if position(path) <= last:
            good.append(path.name)
            continue
        try:
            aside[path.name] = set_aside(path, SUSPECT_PREFIX).name
        except OSError as error:
            left[path.name] = error.strerror or str(error)
    return Suspects(aside, left, good[-1] if good else None)


def _shown(names: Sequence[str]) -> str:
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(names[:NUM_SHOWN]) + more
