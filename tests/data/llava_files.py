"""A small LLaVA dataset on disk: good samples, samples without or with several pictures, and each kind of bad one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_sts.data.records import Reason

NUM_GOOD = 60


def picture(path: Path, number: int) -> bytes:
    """Writes a picture that only this number has, 50 x 40; JPEG or PNG by the name. Returns the file's bytes."""
    noise = np.random.default_rng(number).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise).save(path)
    return path.read_bytes()


def turns(num_images: int, answer: str = "an answer") -> list[dict[str, str]]:
    question = "<image>\n" * num_images + "What is shown?"
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def good_entries(image_dir: Path, count: int = NUM_GOOD, name: str = "good") -> list[dict[str, Any]]:
    """One picture each, but for every 10th sample (text only) and the one after it (two pictures, a list)."""
    entries: list[dict[str, Any]] = []
    for number in range(count):
        entry: dict[str, Any] = {"id": f"{name}-{number}", "conversations": turns(1, f"answer {number}")}
        if number % 10 == 0:
            entry["conversations"] = turns(0, f"answer {number}")
        elif number % 10 == 1:
            entry["images"] = [f"{name}/{number}.{suffix}" for suffix in ("jpg", "png")]
            entry["conversations"] = turns(2, f"answer {number}")
        else:
            entry["image"] = f"{name}/{number}.jpg"
        images = [entry["image"]] if "image" in entry else entry.get("images", [])
        for place, image in enumerate(images):
            picture(image_dir / image, 10 * number + place)
        entries.append(entry)
    return entries


def bad_entries(image_dir: Path) -> dict[str, tuple[Any, Reason]]:
    """By id: an entry that must be rejected, and why."""
    whole = picture(image_dir / "whole.jpg", 1)
    (image_dir / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (image_dir / "text.png").write_text("no picture")
    question = turns(1)[:1]

    def entry(id: str, **fields: Any) -> dict[str, Any]:
        return {"id": id, "image": "whole.jpg", "conversations": turns(1)} | fields

    bad = [
        (entry("missing", image="gone.jpg"), Reason.MISSING),
        (entry("truncated", image="truncated.jpg"), Reason.CORRUPT),
        (entry("text", image="text.png"), Reason.CORRUPT),
        (entry("empty", conversations=[]), Reason.NO_TURNS),
        (entry("no-answer", conversations=question), Reason.NO_ANSWER),
        (entry("blank-answer", conversations=turns(1, "  ")), Reason.NO_ANSWER),
        (entry("no-marker", conversations=turns(0)), Reason.MARKERS),
        (entry("two-markers", conversations=turns(2)), Reason.MARKERS),
        (entry("no-picture", image=[]), Reason.MARKERS),
        (entry("marked-answer", conversations=turns(0, "<image>")), Reason.MARKED_ANSWER),
        (
            entry("marked-system", conversations=[{"from": "system", "value": "<image>"}, *turns(0)]),
            Reason.MARKED_ANSWER,
        ),
        (entry("unknown-role", conversations=[{"from": "owl", "value": "hoo"}]), Reason.ROLE),
        (entry("answer-alone", conversations=turns(1)[1:]), Reason.ORDER),
        (entry("asked-twice", conversations=turns(1)[:1] + turns(0)), Reason.ORDER),
        (entry("two-names", images=["other.jpg"]), Reason.MALFORMED),
        (entry("no-text", conversations=[{"from": "gpt", "value": 3}]), Reason.MALFORMED),
        (entry("number", image=7), Reason.MALFORMED),
        ({"id": "no-conversations"}, Reason.MALFORMED),
        ("neither object nor list", Reason.MALFORMED),
    ]
    return {(e["id"] if isinstance(e, dict) else str(e)): (e, reason) for e, reason in bad}


def write_json(path: Path, entries: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(list(entries)), encoding="utf-8")
    return path
