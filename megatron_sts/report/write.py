"""Writes a page for each run; for two runs also their comparison."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_sts.report.compare import Comparison, compare, markdown, remarks, table_rows, title
from megatron_sts.report.figures import comparison_figure, save_png, utilisation_figure
from megatron_sts.report.groups import check_asked_alike, grouped
from megatron_sts.report.page import run_page
from megatron_sts.report.planned import Planned
from megatron_sts.report.run import Run
from megatron_sts.report.utilisation import utilisation


def report(runs: Sequence[Run], out: Path | None, planned: Sequence[Planned | None] | None = None) -> int:
    """Writes ``report.html``, with LDS also ``utilisation.png``, into each folder; two runs, dense then STS, are also compared, unless
    they are two seeds of one config. ``planned``: of each, what its page is to have beside what was measured. Returns the exit status."""
    groups = grouped(runs)
    is_pair = len(runs) == 2 and not any(len(group.seeds) == 2 for group in groups)
    comparison = compare(*runs) if is_pair else None  # refused before anything is written
    check_asked_alike(groups)
    plans = planned or [None] * len(runs)
    pages = {run.folder / "report.html": run_page(run, plan) for run, plan in zip(runs, plans, strict=True)}
    for path, page in pages.items():
        path.write_text(page, encoding="utf-8")
        print(path)
    for run in runs:
        if found := utilisation(run):
            save_png(utilisation_figure(found), run.folder / "utilisation.png")
            print(run.folder / "utilisation.png")
    if comparison is not None:
        write_comparison(comparison, out or above(runs))
    return 0


def above(runs: Sequence[Run]) -> Path:
    """The folder that holds all of several runs."""
    return Path(os.path.commonpath([run.folder.absolute() for run in runs]))


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Writes ``comparison.json``, ``.md`` and ``.png``, and prints the table."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "comparison.json").write_text(json.dumps(comparison, indent=2) + "\n", encoding="utf-8")
    (folder / "comparison.md").write_text(markdown(comparison), encoding="utf-8")
    save_png(comparison_figure(comparison), folder / "comparison.png")
    table = Table("", title=escape(title(comparison)), title_justify="left")
    first, second = comparison["labels"]
    for heading in (first, second, f"{second} / {first}"):
        table.add_column(escape(heading), justify="right")
    for row in table_rows(comparison):
        table.add_row(*row)
    Console().print(table)
    for line in remarks(comparison):
        print(line)
    print(folder / "comparison.md")
