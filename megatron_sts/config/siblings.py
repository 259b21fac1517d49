"""The file that a name which is not there may have meant: composed or decomposed letters, or another ending. Torch-free."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

ENDINGS = (
    (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    (".json", ".jsonl", ".ndjson"),
    (".yaml", ".yml"),
)
"""Which endings are taken for each other, in either case; a name without one of them may lack a picture's."""
FORMS: dict[Literal["NFC", "NFD"], str] = {"NFC": "composed", "NFD": "decomposed"}
"""Unicode's; macOS and its archives write names decomposed."""


def named_alike(path: Path) -> str:
    """What to say of a file that is there in place of ``path``, which is not; nothing if there is none.

    Only names that can be guessed are looked for: a folder may hold a million pictures.
    """
    for candidate in _candidates(path):
        if candidate != path and os.path.isfile(candidate):
            return f", but {_relation(path, candidate)}"
    return ""


def _candidates(path: Path) -> Iterator[Path]:
    group = next((endings for endings in ENDINGS if path.suffix.lower() in endings), ())
    stem, ending = (path.stem, path.suffix) if group else (path.name, "")
    others = [other for lower in group or ENDINGS[0] for other in (lower, lower.upper())]
    for parent in map(Path, _forms(str(path.parent))):
        for name in _forms(stem):
            for other in (ending, *others):
                yield parent / f"{name}{other}"


def _forms(name: str) -> list[str]:
    return list(dict.fromkeys([name, *(unicodedata.normalize(form, name) for form in FORMS)]))


def _relation(path: Path, candidate: Path) -> str:
    if path.name == candidate.name:
        return f"{candidate} is there, whose folder's name has another Unicode form"
    if unicodedata.normalize("NFC", path.name) != unicodedata.normalize("NFC", candidate.name):
        return f"{candidate.name} is there"
    written = " and ".join(
        f"{word} ({form})" for form, word in FORMS.items() if unicodedata.is_normalized(form, candidate.name)
    )
    return f"the same name in {written or 'other'} letters is there"
