"""Timelines as files: a trace for Perfetto or chrome://tracing, and a picture. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sts.plan.timeline import Event
from megatron_sts.plan.timing.example_step import ExampleStep

COLOURS = {True: ("#9ecae1", "#3182bd"), False: ("#a1d99b", "#31a354")}
"""Of forward and of backward passes, the first and the last round's; rounds in between are mixed."""
INCHES_A_RANK, LEAST_INCHES = 0.35, 2.2


def write_trace(path: Path, steps: Sequence[ExampleStep]) -> None:
    """A process a stage, a thread a pipeline rank, microseconds (Trace Event Format, as chrome://tracing and Perfetto read it)."""
    events = [event for number, step in enumerate(steps) for event in _events(number, step)]
    path.write_text(json.dumps({"displayTimeUnit": "ms", "traceEvents": events}))


def _events(process: int, step: ExampleStep) -> list[dict[str, Any]]:
    named = [
        {
            "ph": "M",
            "name": "process_name",
            "pid": process,
            "args": {"name": f"{step.stage}, step {step.step} (planned)"},
        }
    ]
    named += [
        {"ph": "M", "name": "thread_name", "pid": process, "tid": rank, "args": {"name": f"pipeline rank {rank}"}}
        for rank in range(step.num_ranks)
    ]
    passes = [
        _slice(process, event.rank, _label(event), event.start_s, event.end_s, layers=_layers(step, event))
        for event in step.events
    ]
    return named + passes + _tail(process, step)


def _tail(process: int, step: ExampleStep) -> list[dict[str, Any]]:
    """What follows the passes, on all ranks."""
    slices, start = [], step.pipeline_s
    for name, seconds in (
        ("reduce", step.update.reduce_s),
        ("optimizer", step.update.optimizer_s),
        ("gather", step.update.gather_s),
    ):
        slices += [_slice(process, rank, name, start, start + seconds) for rank in range(step.num_ranks) if seconds]
        start += seconds
    return slices


def _slice(process: int, thread: int, name: str, start_s: float, end_s: float, **args: Any) -> dict[str, Any]:
    return {
        "ph": "X", "name": name, "cat": name.split()[0], "pid": process, "tid": thread,
        "ts": start_s * 1e6, "dur": (end_s - start_s) * 1e6, "args": args,
    }  # fmt: skip


def _label(event: Event) -> str:
    kind = "forward" if event.what.is_forward else "backward"
    return f"{kind} micro-batch {event.what.microbatch} chunk {event.what.chunk}"


def _layers(step: ExampleStep, event: Event) -> float:
    row = step.layers[event.what.microbatch % len(step.layers)]
    return row[event.what.chunk][event.rank]


def draw_timeline(path: Path, steps: Sequence[ExampleStep]) -> None:
    """A picture: a panel a stage, a line a pipeline rank; blue forward, green backward, darker in later rounds, white waiting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = sum(max(step.num_ranks * INCHES_A_RANK, LEAST_INCHES) for step in steps)
    figure, panels = pyplot.subplots(len(steps), 1, figsize=(14, height), squeeze=False, layout="constrained")
    for panel, step in zip(panels[:, 0], steps, strict=True):
        _draw(panel, step)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw(panel: Any, step: ExampleStep) -> None:
    from matplotlib.colors import to_rgb

    num_rounds = len(step.layers[0])
    for rank in range(step.num_ranks):
        mine = [event for event in step.events if event.rank == rank]
        spans = [(event.start_s, event.end_s - event.start_s) for event in mine]
        colours = []
        for event in mine:
            first, last = (to_rgb(name) for name in COLOURS[event.what.is_forward])
            share = event.what.chunk / max(num_rounds - 1, 1)
            colours.append(tuple(a + share * (b - a) for a, b in zip(first, last, strict=True)))
        panel.broken_barh(spans, (rank - 0.45, 0.9), facecolors=colours, edgecolor="white", linewidth=0.2)
    panel.axvspan(
        step.pipeline_s, step.pipeline_s + step.update.total_s, color="#bdbdbd", label="reduce, update, gather"
    )
    panel.set(title=f"{step.stage}, step {step.step}, as planned", ylabel="pipeline rank", xlabel="s")
    panel.set_yticks(range(step.num_ranks))
    panel.invert_yaxis()
    panel.set_xlim(0, step.pipeline_s + step.update.total_s)
    panel.legend(loc="lower right", fontsize="small")
