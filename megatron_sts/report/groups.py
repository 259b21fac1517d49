"""Runs that differ in their seed alone, and what they came to together. Knows no page and no figure."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from megatron_sts.config.errors import ConfigError
from megatron_sts.report.run import Run

SAME = ("model", "parallel", "precision", "data", "stages", "evaluation")
"""Sections of the config that runs of a group have in common."""
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""Student's t for 1, 2, ... degrees of freedom, two-sided 95 %; the last one serves for more of them, which is cautious."""
Z_95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Group:
    """Runs of one config with different seeds."""

    label: str
    runs: Sequence[Run]

    @property
    def complete(self) -> Sequence[Run]:
        """Those that have come to their end."""
        return [run for run in self.runs if run.is_complete]

    @property
    def finished(self) -> Sequence[Run]:
        """Those that have also been evaluated."""
        return [run for run in self.complete if run.evaluation is not None]

    @property
    def seeds(self) -> Sequence[int]:
        """Different ones."""
        return sorted({int(run.config["seed"]) for run in self.runs})

    def of_runs(self, field: str) -> float:
        """A field of the step lines, summed over a run, in the mean over complete runs; over all, as far as they came, if none is."""
        return fmean(run.total(field) for run in self.complete or self.runs)

    def accuracies(self, left_out: frozenset[str]) -> dict[str, Estimate]:
        """By family, and ``mean`` over those that are not ``left_out``; on the split that was evaluated first.

        Over seeds by Student's t (runs of one seed count as their mean); of a single seed over its questions, by the standard errors
        that it tells: another seed may then lie outside.
        """
        found: dict[int, list[dict[str, Any]]] = {}
        for run in self.finished:
            found.setdefault(int(run.config["seed"]), []).append(first_split(run))
        if not found:
            return {}
        families = list(next(iter(found.values()))[0])
        kept = [name for name in families if name not in left_out]
        of_families = {name: self._estimate(found, [name]) for name in families}
        return of_families | ({"mean": self._estimate(found, kept)} if kept else {})

    def _estimate(self, found: dict[int, list[dict[str, Any]]], names: Sequence[str]) -> Estimate:
        means = [fmean(run[name]["accuracy"] for run in runs for name in names) for runs in found.values()]
        if len(means) > 1:
            width = half_width(means)
        else:
            [[run, *_]] = found.values()
            width = Z_95 * math.hypot(*(run[name]["standard_error"] for name in names)) / len(names)
        return Estimate(fmean(means), fmean(means) - width, fmean(means) + width)


def half_width(values: Sequence[float]) -> float:
    """Of the 95 % interval of the mean of several values, by Student's t."""
    return T_95[min(len(values) - 1, len(T_95)) - 1] * stdev(values) / math.sqrt(len(values))


def first_split(run: Run) -> dict[str, Any]:
    """What was measured of each family on the split that was evaluated first."""
    assert run.evaluation is not None
    families: dict[str, Any] = run.evaluation["splits"][run.evaluation["settings"]["splits"][0]]
    return families


def check_asked_alike(groups: Sequence[Group]) -> None:
    """Accuracies beside each other are of the same kind of questions.

    Raises:
        ConfigError: naming two runs of which that is not so.
    """
    runs = [run for group in groups for run in group.finished]
    for run in runs[1:]:
        for name in ("split", "in words"):
            was, first = asked_on(run)[name], asked_on(runs[0])[name]
            if was != first:
                raise ConfigError(
                    f"{run.folder}: its first accuracies are of {name}={was}, those of {runs[0].folder} of {first}; "
                    "give runs that were asked alike"
                )


def asked_on(run: Run) -> dict[str, Any]:
    """What kind of questions ``first_split`` tells of."""
    assert run.evaluation is not None
    settings = run.evaluation["settings"]
    return {"split": settings["splits"][0], "in words": settings.get("words", False)}


def left_out_of_means(groups: Sequence[Group]) -> frozenset[str]:
    """Families that any run leaves out of its mean, or was not asked: means over different families say nothing."""
    runs = [run for group in groups for run in group.finished]
    asked = [frozenset[str](first_split(run)) for run in runs]
    named = [frozenset[str](run.config["evaluation"].get("left_out_of_mean", [])) for run in runs]
    asked_all = frozenset.intersection(*asked) if asked else frozenset()
    return frozenset[str]().union(*named, *asked) - (asked_all - frozenset[str]().union(*named))


def grouped(runs: Sequence[Run]) -> list[Group]:
    """In the order of their first runs. Labels are folders' names without the seed, with as many parents as tell them apart; with the
    seed where nothing else does."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(json.dumps([run.config.get(section) for section in SAME], sort_keys=True), []).append(run)
    return [Group(label, members) for label, members in zip(_labels(list(found.values())), found.values(), strict=True)]


def _labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    paths = [_without_seed(members) for members in groups]
    shared = Counter(paths)
    paths = [
        path if shared[path] == 1 else Path(os.path.abspath(members[0].folder))
        for path, members in zip(paths, groups, strict=True)
    ]
    labels = [path.name for path in paths]
    for depth in range(2, max(len(path.parts) for path in paths) + 1):
        counts = Counter(labels)
        labels = [
            label if counts[label] == 1 else str(Path(*path.parts[-depth:]))
            for label, path in zip(labels, paths, strict=True)
        ]
    return labels


def _without_seed(members: Sequence[Run]) -> Path:
    folder = Path(os.path.abspath(members[0].folder))
    name = re.sub(r"[-_.]?seed[-_=]?\d+", "", folder.name)
    return folder.with_name(name or folder.name)
