"""What a data source yields, before tokens: conversations with lazily decoded images. Knows no tokenizer and no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

import numpy as np

IMAGE_MARKER = "<image>"
"""Stands in a turn's text where an image belongs; the template expands it to placeholder ids."""

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Clip:
    """Frames of a video, which share one ``<image>`` marker."""

    frames: tuple[np.ndarray, ...]
    """uint8 ``[height, width, 3]`` each, RGB; at least one."""

    def __post_init__(self) -> None:
        if not self.frames:
            raise BadSampleError("a video without frames")


@dataclass(frozen=True)
class Views:
    """A picture or a clip as the tower sees it, where that is more than one square, and what its number of tokens follows from."""

    pixels: np.ndarray
    """uint8 ``[views, side, side, 3]``: the overview, then tiles row by row; or frames."""
    way: Literal["tiles", "square", "clip"]
    """How it was cut; see ``config.tiles``."""
    width: int
    """Of the picture, in pixels."""
    height: int


ImageSource = Callable[[], "np.ndarray | Clip | Views"]
"""Decodes one picture when it is needed: uint8 ``[height, width, 3]``, RGB, or what was made of that already. Only ranks that use
pixels call it, unless a picture's number of tokens depends on its size."""


class Reason(StrEnum):
    """Kinds of samples that cannot be used, as ``data prepare`` counts them."""

    MALFORMED = "malformed entry"
    ROLE = "unknown role"
    NO_TURNS = "empty conversation"
    ORDER = "user and assistant do not take turns"
    NO_ANSWER = "no assistant turn with text"
    MARKERS = f"number of {IMAGE_MARKER} markers is not the number of pictures"
    MARKED_ANSWER = f"{IMAGE_MARKER} in an assistant or system turn"
    MISSING = "missing picture"
    CORRUPT = "corrupt picture"
    UNFIT = "picture of a kind that is not used"


class BadSampleError(ValueError):
    """A sample that cannot be used (corrupt image, too long, marker/image mismatch); training skips and counts it.

    ``key`` names the sample where the caller does not hold its record; ``kind`` is set for what a conversation lacks and for whole pictures that are not used.
    """

    def __init__(self, reason: str, key: str | None = None, kind: Reason | None = None) -> None:
        super().__init__(reason)
        self.key, self.kind = key, kind


class UnreadableDataError(ValueError):
    """Reading ended: a file system or a shard failed, not a sample. One line for the user."""


@dataclass(frozen=True)
class SkippedSample:
    """A sample that was not used, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation. Loss falls on assistant turns with text only. A system turn stands first."""

    role: Role
    text: str


@dataclass(frozen=True)
class Record:
    """One sample: its turns, and one ``ImageSource`` for each ``<image>`` marker, in reading order."""

    key: str
    turns: tuple[Turn, ...]
    images: tuple[ImageSource, ...] = ()


class RecordSource(Protocol):
    """An indexable source of records. ``source[i]`` is a pure function of the source's spec and ``i``.

    Raises ``BadSampleError`` for an unusable record. An endless source reports ``len`` as its nominal epoch.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...
