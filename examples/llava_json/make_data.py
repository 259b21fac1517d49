"""Writes a small instruction dataset in LLaVA's format: samples.json and a folder of JPEGs, some of it broken on purpose.

    python make_data.py DIR [--num-samples N]

Stands in for the JSON and pictures that a user has. Most samples show a drawn scene; every tenth is text only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from PIL import Image

from megatron_sts.data.records import Record
from megatron_sts.data.scenes.source import ScenesSource

FAMILIES = ("existence", "ocr", "choice")
ROLES = {"user": "human", "assistant": "gpt"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--num-samples", type=int, default=2000)
    args = parser.parse_args()
    pictures = args.folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    source = ScenesSource("questions", 1, "train", FAMILIES, num_turns=2, num_samples=args.num_samples,
                          text_only_fraction=0.1)  # fmt: skip
    entries = [entry(source[number], f"{number:05d}", pictures) for number in range(args.num_samples)]
    (args.folder / "samples.json").write_text(json.dumps(entries + broken(pictures)), encoding="utf-8")


def entry(record: Record, key: str, pictures: Path) -> dict[str, Any]:
    """A record as LLaVA writes it; its picture goes into ``pictures``."""
    turns = [{"from": ROLES[turn.role], "value": turn.text} for turn in record.turns]
    found: dict[str, Any] = {"id": key, "conversations": turns}
    for decode in record.images:
        found["image"] = f"{key}.jpg"
        Image.fromarray(decode()).save(pictures / found["image"], quality=95)
    return found


def broken(pictures: Path) -> list[dict[str, Any]]:
    """What goes wrong in real data: a cut file, a missing one, an empty conversation."""
    turns = [{"from": "human", "value": "<image>\nwhat is it?"}, {"from": "gpt", "value": "a cat"}]
    whole = min(pictures.glob("0*.jpg"))
    (pictures / "cut.jpg").write_bytes(whole.read_bytes()[:200])
    return [
        {"id": "cut", "image": "cut.jpg", "conversations": turns},
        {"id": "missing", "image": "missing.jpg", "conversations": turns},
        {"id": "empty", "image": whole.name, "conversations": []},
    ]


if __name__ == "__main__":
    main()
