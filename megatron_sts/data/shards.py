"""One shard of a prepared dataset: checks LLaVA entries and writes the good ones to a tar file. Knows no Energon.

A shard is written to a folder for work in progress and moved into place when it is whole; then its report is written there,
which says that the shard is done. Runs in worker processes, so it imports little.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from megatron_sts.config.siblings import named_alike
from megatron_sts.data.conversation import check_answers, check_markers
from megatron_sts.data.image import decode_bytes
from megatron_sts.data.llava_json import entry_key, is_clip, num_marked, parse_entry
from megatron_sts.data.records import BadSampleError, Reason

WORK_FOLDER = ".prepare"
"""In the dataset's folder: shards being written, and a report for each that is done."""


class RejectedError(Exception):
    """An entry that is left out of the dataset."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class ShardTask:
    """The entries of one shard."""

    number: int
    first: int
    """Place of the first entry in the source."""
    entries: list[Any]
    image_dir: Path
    out: Path
    """Folder of the dataset."""


@dataclass(frozen=True)
class ShardReport:
    """What became of a shard's entries."""

    num_samples: int
    rejected: list[dict[str, Any]] = field(default_factory=list)
    """``number`` (place in the source), ``id``, ``reason`` and ``detail`` of each."""
    changes: dict[str, int] = field(default_factory=dict)
    """What training will do to pictures beyond decoding them, and to how many."""


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:06d}.tar"


def read_report(out: Path, number: int) -> ShardReport | None:
    """The report of a shard that is done, else None."""
    path = _report_path(out, number)
    return ShardReport(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def write_shard(task: ShardTask) -> ShardReport:
    """Write the shard's tar file (none if no entry is good), then its report."""
    unfinished = task.out / WORK_FOLDER / f"{shard_name(task.number)}.tmp"
    num_samples, rejected, changes = 0, [], Counter[str]()
    with tarfile.open(unfinished, "w") as tar:
        for number, entry in enumerate(task.entries, task.first):
            try:
                parts, changed = _sample_parts(entry, number, task.image_dir)
            except RejectedError as error:
                found = {"number": number, "id": entry_key(entry, f"number {number}"), "reason": error.reason}
                rejected.append(found | {"detail": error.detail})
                continue
            num_samples += 1
            changes += changed
            for extension, content in parts:
                _add(tar, f"{number:09d}.{extension}", content)
    if num_samples:
        os.replace(unfinished, task.out / shard_name(task.number))
    else:
        unfinished.unlink()
    report = ShardReport(num_samples, rejected, dict(changes))
    write_atomically(_report_path(task.out, task.number), json.dumps(asdict(report), ensure_ascii=False))
    return report


def write_atomically(path: Path, text: str) -> None:
    """The file has this text or is as it was."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _report_path(out: Path, number: int) -> Path:
    return out / WORK_FOLDER / f"{number:06d}.json"


def _sample_parts(entry: Any, number: int, image_dir: Path) -> tuple[list[tuple[str, bytes]], Counter[str]]:
    """(extension, content) of a sample's files: its text, then its pictures as they are; and what these will undergo."""
    try:
        turns, names = parse_entry(entry)
        check_answers(turns)
        check_markers(turns, num_marked(entry, names))
    except BadSampleError as error:
        raise RejectedError(error.kind or Reason.MALFORMED, str(error)) from error
    conversations = [{"from": turn["from"], "value": turn["value"]} for turn in entry["conversations"]]
    video = {"video": True} if is_clip(entry) else {}
    said = {"id": entry_key(entry, f"number {number}"), "conversations": conversations, **video}
    text = json.dumps(said, ensure_ascii=False)
    parts, changes = [("json", text.encode("utf-8"))], Counter[str]()
    for place, name in enumerate(names):
        suffix = Path(name).suffix[1:].lower()
        encoded, changed = _checked_picture(image_dir / name, name)
        parts.append((f"{place}.{suffix if suffix.isalnum() else 'image'}", encoded))
        changes.update(changed)
    return parts, changes


def _checked_picture(path: Path, name: str) -> tuple[bytes, frozenset[str]]:
    """The file's bytes, which decode in full, and what decoding does beyond that."""
    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise RejectedError(Reason.MISSING, f"{name}: {error.strerror}{named_alike(path)}") from error
    try:
        return encoded, decode_bytes(encoded, name).changes
    except BadSampleError as error:
        raise RejectedError(error.kind or Reason.CORRUPT, str(error)) from error


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """A member without time and owner, so that the same samples give the same bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, BytesIO(content))
