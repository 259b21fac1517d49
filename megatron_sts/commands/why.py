"""Why a run is not faster, for ``report --why``: prints."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megatron_sts.report.facts import facts_of
from megatron_sts.report.planned import Planned
from megatron_sts.report.run import Run
from megatron_sts.report.why import HEADINGS, NOTHING, findings, rows


def print_why(run: Run, planned: Planned | None) -> None:
    """Of each stage where its seconds went, and what loses most."""
    console, found = Console(highlight=False), facts_of(run, planned)
    if not found:
        console.print(f"{run.folder}: no stage has two steps whose lines tell where their time went", soft_wrap=True)
    for facts in found:
        table = Table(
            title=f"{run.folder.resolve().name}, {facts.stage}: a step in the mean of {facts.num_steps}",
            title_justify="left",
        )
        for place, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if place else "left")
        for row in rows(facts):
            table.add_row(*row)
        console.print(table)
        for place, finding in enumerate(lost := findings(facts), start=1):
            console.print(f"{place}. {finding.line}", markup=False)
            for remedy in finding.remedies:
                console.print(f"   - {remedy}", markup=False)
        if not lost:
            console.print(NOTHING)
