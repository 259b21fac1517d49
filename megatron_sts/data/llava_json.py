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
        return self._record(self._entries[self._order(epoch)[place]])

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = list(range(len(self._entries)))
            random.Random(f"{self._seed}/{epoch}").shuffle(order)
            self._orders = {epoch: order}
        return self._orders[epoch]

    def _record(self, entry: dict[str, Any]) -> Record:
        key = str(entry.get("id", "without id"))
        images = entry.get("image", [])
        paths = [images] if isinstance(images, str) else list(images)
        try:
            turns = tuple(Turn(ROLES[turn["from"]], turn["value"]) for turn in entry["conversations"])
        except (KeyError, TypeError) as error:
            raise BadSampleError(
                f"sample {key}: conversations need turns with 'from' and 'value' ({error!r})"
            ) from error
        return Record(key, turns, tuple(partial(decode_image, self._image_dir / path) for path in paths))
