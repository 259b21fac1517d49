"""LLaVA JSON and pictures become WebDataset shards that Energon reads.

The shards are planned before any is written, from the source and the pictures' sizes alone, and worker processes write whole
shards: so the same input gives the same bytes with any number of workers and of parts, and an interrupted run goes on where it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_sts.config.errors import refuse
from megatron_sts.config.prepared import ENERGON_FOLDER, SETTINGS_NAME
from megatron_sts.config.samples_file import read_entries
from megatron_sts.data.llava_json import parse_entry
from megatron_sts.data.records import BadSampleError
from megatron_sts.data.shards import (
    WORK_FOLDER,
    ShardReport,
    ShardTask,
    read_report,
    shard_name,
    write_atomically,
    write_shard,
)
from megatron_sts.launch.follow import end_with_parent
from megatron_sts.runtime.progress_lines import ProgressLines

REJECTED_NAME = "rejected.jsonl"
PLAN_NAME = "plan.json"
"""In the work folder, of a dataset that is prepared in parts: how many shards it has."""
FORMAT = 2
"""Raised when the same input begins to give other shards."""


@dataclass(frozen=True)
class Summary:
    """What came of a source."""

    num_samples: int
    num_shards: int
    rejected: Counter[str]
    """Entries left out, by reason."""
    changes: Counter[str]
    """Pictures to which training does more than decode them, by what it does."""


@dataclass(frozen=True)
class Part:
    """One of several jobs that prepare a dataset together."""

    number: int
    """From 1 on."""
    count: int

    def has(self, shard: int) -> bool:
        """Whether it writes this shard: every count-th, because neighbours are alike."""
        return shard % self.count == self.number - 1


WHOLE = Part(1, 1)


def prepare(
    source: Path, image_dir: Path, out: Path, shard_size_mb: int, num_workers: int, part: Part = WHOLE
) -> Summary:
    """Write the dataset folder ``out``: shards, Energon's index of them, and ``rejected.jsonl``; of a part only its shards.

    Args:
        source: LLaVA entries, as ``read_entries`` takes them.
        image_dir: folder that picture names are relative to.
        out: a new folder, or one that the same call began.
        shard_size_mb: about the size of a shard; one sample may be larger.
        num_workers: processes that check pictures and write shards.
        part: parts may run at the same time, on several machines; ``merge`` is for when all are done.

    Returns:
        What came of the source, or of this part of it.

    Raises:
        ConfigError: the source is not readable, or ``out`` holds something else.
    """
    entries = read_entries(source, "JSON")
    if not image_dir.is_dir():
        refuse("--images", image_dir, "no such folder", "give the folder that picture names are relative to")
    sizes = _picture_bytes(entries, image_dir)
    settings = {
        "format": FORMAT,
        "source_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "pictures_sha256": hashlib.sha256(json.dumps(sizes).encode()).hexdigest(),
        "shard_size_mb": shard_size_mb,
    }
    _claim(out, settings)
    tasks = [
        ShardTask(number, start, entries[start:stop], image_dir, out)
        for number, (start, stop) in enumerate(_plan(entries, sizes, shard_size_mb * 2**20))
    ]
    if part.count == 1:
        return _finish(out, _write_shards(tasks, num_workers), num_workers, settings)
    _replace(out / WORK_FOLDER / PLAN_NAME, json.dumps({"num_shards": len(tasks)}), out / WORK_FOLDER)
    return _summary(_write_shards([task for task in tasks if part.has(task.number)], num_workers))


def merge(out: Path, num_workers: int) -> Summary:
    """What is left to do once all parts of the dataset folder ``out`` are written: its index and ``rejected.jsonl``.

    Raises:
        ConfigError: a part is missing, or it was not prepared in parts.
    """
    try:
        num_shards = json.loads((out / WORK_FOLDER / PLAN_NAME).read_text(encoding="utf-8"))["num_shards"]
        settings = json.loads((out / SETTINGS_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError):
        refuse("--out", out, "no part of a dataset was prepared here", "run data prepare with --part first")
    reports = [read_report(out, number) for number in range(num_shards)]
    missing = [number for number, report in enumerate(reports) if report is None]
    if missing:
        refuse("--out", out, f"{len(missing)} of {num_shards} shards are not written, the first is {shard_name(missing[0])}",
               "run the parts that did not end again: they go on where they were")  # fmt: skip
    return _finish(out, [report for report in reports if report is not None], num_workers, settings)


def _finish(out: Path, reports: Sequence[ShardReport], num_workers: int, settings: dict[str, Any]) -> Summary:
    rejected = [entry for report in reports for entry in report.rejected]
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in rejected)
    write_atomically(out / REJECTED_NAME, lines)
    names = [shard_name(number) for number, report in enumerate(reports) if report.num_samples]
    if names:
        _index(out, names, num_workers, settings)
    return _summary(reports)


def _summary(reports: Sequence[ShardReport]) -> Summary:
    return Summary(
        num_samples=sum(report.num_samples for report in reports),
        num_shards=sum(report.num_samples > 0 for report in reports),
        rejected=Counter(entry["reason"] for report in reports for entry in report.rejected),
        changes=sum((Counter(report.changes) for report in reports), Counter[str]()),
    )


def _picture_bytes(entries: Sequence[Any], image_dir: Path) -> list[list[int]]:
    """Bytes of each entry's pictures; -1 for one that is missing."""

    def sizes(entry: Any) -> list[int]:
        try:
            return [_size(image_dir / name) for name in parse_entry(entry)[1]]
        except BadSampleError:
            return []

    with ThreadPoolExecutor(16) as pool:  # a network file system answers many at once
        return list(pool.map(sizes, entries))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Make ``out`` this run's folder, unless it is another's."""
    begun, work = out / SETTINGS_NAME, out / WORK_FOLDER
    if begun.exists():
        _check_same(out, json.loads(begun.read_text(encoding="utf-8")), settings)
    elif out.exists() and (not out.is_dir() or any(path not in (work, begun) for path in out.iterdir())):
        refuse("--out", out, "neither empty nor begun by this command", "give another folder")
    work.mkdir(parents=True, exist_ok=True)
    _replace(begun, json.dumps(settings, indent=2) + "\n", work)


def _replace(path: Path, text: str, work: Path) -> None:
    """As ``write_atomically``, also when several parts write the same."""
    unfinished = work / f".{path.name}.{os.uname().nodename}.{os.getpid()}"
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _check_same(out: Path, begun: dict[str, Any], settings: dict[str, Any]) -> None:
    said = {
        "format": "another version of megatron-sts",
        "source_sha256": "another JSON file",
        "pictures_sha256": "other pictures",
        "shard_size_mb": f"--shard-size-mb={begun['shard_size_mb']}, not {settings['shard_size_mb']}",
    }
    for key, what in said.items():
        if begun[key] != settings[key]:
            refuse("--out", out, f"was begun with {what}", "give another folder, or delete this one")


def _plan(entries: Sequence[Any], sizes: Sequence[list[int]], shard_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each shard's entries: cut before the one that would make it larger than ``shard_bytes``."""
    start = filled = 0
    for number, (entry, pictures) in enumerate(zip(entries, sizes, strict=True)):
        num_bytes = len(json.dumps(entry)) + sum(pictures)
        if filled and filled + num_bytes > shard_bytes:
            yield start, number
            start, filled = number, 0
        filled += num_bytes
    if filled:
        yield start, len(entries)


def _write_shards(tasks: Sequence[ShardTask], num_workers: int) -> list[ShardReport]:
    """The reports of all shards; those that an earlier run finished are kept."""
    reports = {task.number: read_report(task.out, task.number) for task in tasks}
    missing = [task for task in tasks if reports[task.number] is None]
    bar = Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(stderr=True))  # fmt: skip
    spawn = multiprocessing.get_context("spawn")  # forking beside the threads of the progress bar may deadlock
    with bar, ProcessPoolExecutor(num_workers, spawn, _start_worker) as pool:
        total = sum(len(task.entries) for task in tasks)
        done = total - sum(len(task.entries) for task in missing)
        shown, lines = bar.add_task("entries", total=total, completed=done), ProgressLines(bar, "entries", total)
        futures = {pool.submit(write_shard, task): task for task in missing}
        try:
            for future in as_completed(futures):
                task = futures[future]
                reports[task.number] = future.result()
                bar.advance(shown, len(task.entries))
                done += len(task.entries)
                lines.tell(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [report for task in tasks if (report := reports[task.number]) is not None]


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, which lets shards in progress finish; end with a parent that is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None and parent.pid is not None
    end_with_parent(parent.pid)


def _index(out: Path, names: list[str], num_workers: int, settings: dict[str, Any]) -> None:
    """Energon's own preparation, all shards in split train; ``dataset.yaml``, written last, says that it is whole."""
    folder = out / ENERGON_FOLDER
    if (folder / "dataset.yaml").exists():
        return
    from megatron.energon.flavors import BaseWebdatasetFactory

    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.redirect_stdout(io.StringIO()):
        BaseWebdatasetFactory.prepare_dataset(
            out, names, split_parts_ratio=[("train", 1.0)], shuffle_seed=None, workers=num_workers
        )
    identity = uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(settings))
    (folder / "index.uuid").write_text(str(identity))  # Energon draws one at random
    write_atomically(
        folder / "dataset.yaml", yaml.dump({"__module__": "megatron.energon", "__class__": "CrudeWebdataset"})
    )
