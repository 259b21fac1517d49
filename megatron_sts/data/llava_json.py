"""LLaVA-style instruction data: a JSON list of ``{id, image, conversations}`` beside a folder of pictures."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any, Literal

from megatron_sts.data.image import decode_image
from megatron_sts.data.records import BadSampleError, Record, Turn

ROLES: dict[str, Literal["user", "assistant"]] = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
}  # fmt: skip


class LlavaJsonSource:
    """A ``RecordSource`` over a LLaVA JSON; each epoch is shuffled by (seed, epoch)."""

    def __init__(self, path: Path, image_dir: Path | None, seed: int) -> None:
        self._entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
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
        key = str(entry["id"]) if isinstance(entry, dict) and "id" in entry else f"number {number}"
        try:
            turns = tuple(_turn(turn) for turn in entry["conversations"])
            images = entry.get("image") or []
            paths = [self._image_dir / path for path in ([images] if isinstance(images, str) else images)]
        except (KeyError, TypeError) as error:
            reason = f"not {{id, image, conversations: [{{from, value}}, ...]}} ({type(error).__name__}: {error})"
            raise BadSampleError(reason, key) from error
        return Record(key, turns, tuple(partial(decode_image, path) for path in paths))


def _turn(turn: dict[str, Any]) -> Turn:
    if not isinstance(turn["value"], str):
        raise TypeError("value is no text")
    return Turn(ROLES[turn["from"]], turn["value"])
