"""The named sprites that ship with the package: what exists, not how it looks. Knows no scene and no pixel."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

KINDS = ("animal", "food", "travel", "object")


def asset(name: str) -> Traversable:
    """A file of ``scenes/assets``."""
    return files(__package__) / "assets" / name


@dataclass(frozen=True)
class Catalog:
    """The sprites in sheet order; a sprite's id is its index."""

    names: tuple[str, ...]
    """One lowercase word each."""
    kinds: tuple[str, ...]
    """One of ``KINDS`` each."""
    heldout: tuple[bool, ...]
    """True where the sprite never appears in an image of the train split."""

    def __len__(self) -> int:
        return len(self.names)


@cache
def load_catalog() -> Catalog:
    """The embedded catalog, read once."""
    entries = json.loads(asset("catalog.json").read_text())
    return Catalog(
        names=tuple(entry["name"] for entry in entries),
        kinds=tuple(entry["kind"] for entry in entries),
        heldout=tuple(entry["heldout"] for entry in entries),
    )
