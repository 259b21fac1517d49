"""Which name somebody meant. Torch-free; knows no config."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import combinations

LEAST_ALIKE = 0.6
"""As ``difflib.get_close_matches`` has it: less is another word."""
PART_OF_A_NAME = 0.85
"""How much it counts to be like some words of a name (``context`` of ``context_parallel_size``) instead of all of them."""


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The one of ``known`` that is most like ``name``, the earliest of several; None if none is."""
    best = max(known, key=lambda each: alike(name, each), default=None)
    return best if best is not None and alike(name, best) >= LEAST_ALIKE else None


def nearest_path(name: str, known: Sequence[str]) -> str | None:
    """The dotted name whose last pieces are, each, most like the pieces of ``name``; None if one of them is like none."""
    pieces = name.split(".")

    def likeness(path: str) -> tuple[float, float]:
        last = path.split(".")[-len(pieces) :]
        if len(last) < len(pieces):
            return 0.0, 0.0
        each = [alike(written, meant) for written, meant in zip(pieces, last, strict=True)]
        return (sum(each) if min(each) >= LEAST_ALIKE else 0.0), -float(path.count("."))

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best)[0] > 0 else None


def alike(name: str, other: str) -> float:
    """From 0 to 1: of the letters of both, those that stand in the same order; in some words of ``other`` they count a little less."""
    words = other.split("_")
    parts = {"_".join(words[start:end]) for start, end in combinations(range(len(words) + 1), 2)} - {other}
    return max(_ratio(name, other), *(PART_OF_A_NAME * _ratio(name, part) for part in parts), 0.0)


def _ratio(name: str, other: str) -> float:
    return SequenceMatcher(None, name.lower(), other.lower()).ratio()
