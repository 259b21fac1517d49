"""Where a stage's seconds go, what the plan has in their place, and what loses most. Knows no page and no terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_sts.report.facts import Facts
from megatron_sts.report.rules import RULES, Rule, launch_wait_s

Row = tuple[str, str, str, str]


@dataclass(frozen=True)
class Finding:
    """A rule that fired."""

    name: str
    meaning: str
    """With what else there is to say of the run."""
    seconds: float
    """A step."""
    share: float
    """Of the time."""
    planned_s: float | None
    remedies: tuple[str, ...]

    @property
    def line(self) -> str:
        """All of it but what to try."""
        planned = "" if self.planned_s is None else f", planned {_seconds(self.planned_s)}"
        meaning = self.meaning[0].upper() + self.meaning[1:]
        return f"{self.name}: {_seconds(self.seconds)} a step, {self.share:.0%} of the time{planned}. {meaning}. Try:"


def findings(facts: Facts, rules: Iterable[Rule] = RULES) -> list[Finding]:
    """Most seconds first. They overlap: a slow rank is what others wait for, and padding is computed in passes."""
    found = []
    for rule in rules:
        seconds = rule.seconds(facts)
        if seconds > rule.share * facts.total_s:
            remedies = tuple(remedy.text for remedy in rule.remedies if remedy.when(facts))
            share = seconds / facts.total_s
            meaning = ": ".join(filter(None, (rule.meaning, rule.detail(facts))))
            found.append(Finding(rule.name, meaning, seconds, share, rule.planned_s(facts), remedies))
    return sorted(found, key=lambda finding: -finding.seconds)


NOTHING = "No part takes more of the time than it should."
HEADINGS = ("of a step", "seconds", "share", "planned, s")


def rows(facts: Facts) -> Iterator[Row]:
    """All the time there is, by what it was for, with the plan's where there is one."""
    plan = facts.plan
    pipeline_s, bubble = (0.0, 0.0) if plan is None else (plan["split_s"]["pipeline"], plan["bubble"])
    by_rule = {rule.name: rule for rule in RULES}

    def planned(name: str) -> float | None:
        return by_rule[name].planned_s(facts)

    parts = facts.parts_s
    within_s = planned("layer communication")
    passes_s = None if plan is None or within_s is None else pipeline_s * (1 - bubble) - within_s
    yield _row(facts, "forward and backward passes", facts.pass_s, passes_s)
    launch_s = None if facts.pass_mfu is None else launch_wait_s(facts)
    yield _row(facts, "  of them launch overhead, estimated", launch_s, planned("launch overhead"))
    yield _row(facts, "layer communication", parts["layer_communication_s"], within_s)
    yield _row(facts, "bubble", parts["pipeline_wait_s"], planned("bubble"))
    yield _row(facts, "communication", parts["communication_s"], planned("communication"))
    yield _row(facts, "optimizer", parts["optimizer_s"], planned("optimizer"))
    for label, part in (("data", "data_s"), ("checkpoint", "checkpoint_s"), ("the rest", "other_s")):
        yield _row(facts, label, parts[part], None)
    yield _row(facts, "all", facts.total_s, None if plan is None else plan["step_time_s"])


def _row(facts: Facts, name: str, seconds: float | None, planned_s: float | None) -> Row:
    """None: not known."""
    measured = ("n/a", "n/a") if seconds is None else (_number(seconds), f"{seconds / facts.total_s:.1%}")
    return name, *measured, "" if planned_s is None else _number(planned_s)


def _number(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds >= 0.001 else f"{seconds:.1g}"


def _seconds(seconds: float) -> str:
    return f"{_number(seconds)} s"
