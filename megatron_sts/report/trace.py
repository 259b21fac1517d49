"""What pipeline ranks did in a step, as a trace for Perfetto or chrome://tracing; and several of them in one view."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TRACES = "traces"
"""Of a run's folder: a file a stage."""

Event = dict[str, Any]
"""Of the Trace Event Format."""


def write_trace(run_dir: Path, stage: str, step: int, ranks: Sequence[Sequence[tuple[str, float, float]]]) -> None:
    """A process for the step, a thread a pipeline rank; ``ranks``: of each what it did, from and until when in seconds."""
    named = [_name("process_name", 0, f"{stage}, step {step} (measured)")]
    named += [_name("thread_name", 0, f"pipeline rank {rank}", rank) for rank in range(len(ranks))]
    done = [
        {"ph": "X", "name": kind.replace("_", " "), "cat": kind, "pid": 0, "tid": rank, "ts": start_s * 1e6, "dur": (end_s - start_s) * 1e6}
        for rank, spans in enumerate(ranks)
        for kind, start_s, end_s in spans
    ]  # fmt: skip
    folder = run_dir / TRACES
    folder.mkdir(exist_ok=True)
    partial = folder / f".{stage}.json"
    partial.write_text(_text([*named, *done]))
    partial.replace(folder / f"{stage}.json")


def join_traces(files: Sequence[Path], to: Path) -> None:
    """All their processes in one view, those of the first file first."""
    events: list[Event] = []
    for file in files:
        first = 1 + max((event["pid"] for event in events), default=-1)
        found = json.loads(file.read_text())["traceEvents"]
        events += [{**event, "pid": first + event["pid"]} for event in found]
    to.write_text(_text(events))


def _name(what: str, process: int, name: str, thread: int = 0) -> Event:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}


def _text(events: Sequence[Event]) -> str:
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events})
