"""LLaVA-style instruction data: entries ``{id, image, conversations}`` of a JSON file beside a folder of pictures.

``image`` (or ``images``) is a file name or a list of them, in the order of the ``<image>`` markers; it may be absent. ``video`` in its
place lists the files of a video's frames, which share one ``<video>`` (or ``<image>``) marker.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sts.config.samples_file import read_entries
from megatron_sts.data.conversation import in_order
from megatron_sts.data.image import decode_clip, decode_image
from megatron_sts.data.records import IMAGE_MARKER, BadSampleError, Reason, Record, Role, Turn

VIDEO_MARKER = "<video>"
ROLES: dict[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
}  # fmt: skip


class LlavaJsonSource:
    """A ``RecordSource`` over a LLaVA JSON; each epoch is shuffled by (seed, epoch)."""

    def __init__(self, path: Path, image_dir: Path | None, seed: int) -> None:
        self._entries = read_entries(path, "data.path")
        self._image_dir = image_dir or path.parent
        self._seed = seed
        self._orders: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Record:
        epoch, place = divmod(index, len(self._entries))
        return self._record(self._order(epoch)[place])

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self._entries)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._orders = {epoch: order}
        return self._orders[epoch]

    def _record(self, number: int) -> Record:
        entry = self._entries[number]
        key = entry_key(entry, f"number {number}")
        try:
            turns, names = parse_entry(entry)
        except BadSampleError as error:
            raise BadSampleError(str(error), key) from error
        if is_clip(entry):
            return Record(key, turns, (partial(decode_clip, [self._image_dir / name for name in names]),))
        return Record(key, turns, tuple(partial(decode_image, self._image_dir / name) for name in names))


def entry_key(entry: Any, otherwise: str) -> str:
    """What names a sample in logs: its ``id``, if it has one."""
    key = str(entry["id"]) if isinstance(entry, dict) and "id" in entry else otherwise
    return key.encode("utf-8", "backslashreplace").decode("utf-8")


def parse_entry(entry: Any) -> tuple[tuple[Turn, ...], tuple[str, ...]]:
    """The turns of a LLaVA entry that are trained, and the names of its pictures or frames; a video's marker is an ``<image>`` then.

    Raises:
        BadSampleError: it has another form, an unknown role, or its roles take no turns.
    """
    try:
        turns = [_turn(turn, is_clip=is_clip(entry)) for turn in entry["conversations"]]
        single, several = entry.get("image") or [], entry.get("images") or []
        names = [_names(found) for found in (single, several) if found]
        if is_clip(entry):
            names.append(_frames(entry["video"]))
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"not {{id, image, conversations: [{{from, value}}, ...]}} ({type(error).__name__}: {error})"
        raise BadSampleError(reason, kind=Reason.MALFORMED) from error
    if len(set(names)) > 1:
        raise BadSampleError(
            "image, images and video name different pictures; remove all but one", kind=Reason.MALFORMED
        )
    return in_order(turns), names[0] if names else ()


def is_clip(entry: Any) -> bool:
    """Whether an entry's pictures are a video's frames. (In shards they are files beside it, and ``video`` is true.)"""
    return isinstance(entry, dict) and bool(entry.get("video"))


def num_marked(entry: Any, names: Sequence[str]) -> int:
    """Markers that its pictures have."""
    return 1 if is_clip(entry) else len(names)


def _frames(video: Any) -> tuple[str, ...]:
    if isinstance(video, str):
        raise BadSampleError("video is one file; list the files of its frames", kind=Reason.MALFORMED)
    return () if video is True else _names(video)


def _turn(turn: dict[str, Any], *, is_clip: bool) -> Turn:
    role, text = turn["from"], _text(turn["value"])
    if is_clip:
        text = text.replace(VIDEO_MARKER, IMAGE_MARKER)
    if role not in ROLES:
        raise BadSampleError(f"unknown role {role!r}; known are {', '.join(ROLES)}", kind=Reason.ROLE)
    return Turn(ROLES[role], text)


def _names(images: Any) -> tuple[str, ...]:
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, list):
        raise TypeError(f"{type(images).__name__} is no file name and no list of them")
    if any("\0" in _text(name) for name in names):
        raise TypeError("a file name holds a zero character")
    return tuple(names)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, where an emoji was cut in two
        raise BadSampleError(f"not Unicode text ({error})", kind=Reason.MALFORMED) from error
    return value
