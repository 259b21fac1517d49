"""Where the seconds of a stage's steps went, over the whole run and by rank. Knows no page and no figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sts.report.fields import BETWEEN, PARTS
from megatron_sts.report.run import Line, Run


@dataclass(frozen=True)
class Times:
    """Of one stage."""

    parts: dict[str, float]
    """Seconds a step of the mean rank, by field."""
    ranks: dict[str, Sequence[float]]
    """The same of every rank, medians of the last window that a ``ranks`` event tells of; empty without one."""


def times(run: Run) -> dict[str, Times]:
    """By stage, for those whose lines tell."""
    found = {}
    for stage, lines in run.steps.items():
        timed = [line for line in lines if PARTS[0] in line]
        if timed:
            event = run.ranks.get(stage, {})
            ranks = {part: event[part] for part in PARTS if part in event}
            found[stage] = Times({part: _mean(timed, part) for part in (*PARTS, BETWEEN)}, ranks)
    return found


def _mean(lines: Sequence[Line], field: str) -> float:
    return sum(line[field] for line in lines) / len(lines)
