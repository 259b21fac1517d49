"""Benchmark results as tables. Knows the metrics' layout, not what they mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from megatron_sts.evaluate.metrics import Metrics

MOST_GROUPS = 14
"""Breakdowns into more groups (MME has 14 subtasks) are in the JSON alone."""


def print_tables(results: Sequence[Metrics]) -> None:
    """The metric that papers quote for each benchmark, accuracy by question family, and the benchmarks' own groups."""
    console = Console()
    console.print(_headlines(results))
    console.print(_families(results))
    console.print(_breakdowns(results))


def _headlines(results: Sequence[Metrics]) -> Table:
    table = Table(title="Benchmarks", title_justify="left")
    table.add_column("benchmark")
    table.add_column("metric")
    for heading in ("value", "questions", "not read", "left out: no image"):
        table.add_column(heading, justify="right")
    for result in results:
        metric = result["headline"]
        counts = (str(result[name]) for name in ("num_questions", "num_unread", "num_left_out"))
        table.add_row(result["benchmark"], metric, f"{result[metric]:.4g}", *counts)
    return table


def _families(results: Sequence[Metrics]) -> Table:
    table = Table("family", title="Accuracy by question family (questions)", title_justify="left")
    for result in results:
        table.add_column(result["benchmark"], justify="right")
    for name in sorted({name for result in results for name in result["family"]}):
        table.add_row(name, *(_short_cell(result["family"].get(name)) for result in results))
    return table


def _breakdowns(results: Sequence[Metrics]) -> Table:
    title = "Accuracy by the benchmarks' own groups ± standard error (questions)"
    table = Table("benchmark", "by", "group", title=title, title_justify="left")
    table.add_column("accuracy", justify="right")
    for result in results:
        for kind, groups in _kinds(result):
            for name, found in groups.items():
                table.add_row(result["benchmark"], kind, name, _cell(found))
    return table


def _kinds(result: Metrics) -> Iterator[tuple[str, dict[str, Metrics]]]:
    for kind, groups in result.items():
        if isinstance(groups, dict) and kind != "family" and len(groups) <= MOST_GROUPS:
            yield kind, groups


def _short_cell(found: Metrics | None) -> str:
    return f"{found['accuracy']:.3f} ({found['num_questions']})" if found else ""


def _cell(found: Metrics) -> str:
    return f"{found['accuracy']:.3f} ± {found['standard_error']:.3f} ({found['num_questions']})"
