"""How accurate runs are beside others, question by question and seed by seed. Knows no page and no figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_sts.report.groups import Estimate, Group, first_split
from megatron_sts.report.run import Run

NUM_DRAWS = 4000
TOGETHER = {"paired": 2}
"""Questions about one picture, which follow each other: drawn together."""
Bits = NDArray[np.float64]
"""Whether each question was answered right, [seeds, pictures, questions of a picture]."""


def ratios_of(group: Group, base: Group, left_out: frozenset[str]) -> dict[str, Estimate]:
    """Accuracy of ``group`` / ``base`` by family, and of their means (``mean``, without ``left_out``), with 95 % intervals.

    Of the seeds that both have, on questions that both were asked; nothing without such, or where runs do not tell which they answered
    right. Intervals are a bootstrap's percentiles: pictures and seeds are drawn anew, with replacement, both runs of a seed and both
    answers to a question together. Three seeds are few to draw from: the interval says little of other seeds.
    """
    seeds = shared_seeds(group, base)
    found = {}
    for family in _families(group, base):
        both = [_answers([_by_seed(each)[seed] for seed in seeds], family) for each in (group, base)]
        if both[0] is not None and both[1] is not None and both[0].shape == both[1].shape:
            found[family] = (both[0], both[1])
    kept = {family: answers for family, answers in found.items() if family not in left_out}
    wanted = [family for family in _families(group, base) if family not in left_out]
    named = {family: {family: answers} for family, answers in found.items()}
    if kept and len(kept) == len(wanted):  # else it would be the mean of other families
        named["mean"] = kept
    return {name: _ratio(families) for name, families in named.items()} if seeds else {}


def shared_seeds(group: Group, base: Group) -> list[int]:
    """Of finished runs of both."""
    return sorted(_by_seed(group).keys() & _by_seed(base).keys())


def _ratio(families: Mapping[str, tuple[Bits, Bits]]) -> Estimate:
    ours, base = (sum(answers[side].mean() for answers in families.values()) for side in (0, 1))
    if not base:
        return Estimate(math.nan, math.nan, math.nan)
    numbers = np.random.default_rng(0)
    num_seeds = next(iter(families.values()))[0].shape[0]
    seeds = numbers.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), NUM_DRAWS) / num_seeds
    drawn = np.zeros((2, NUM_DRAWS))
    for answers in families.values():
        count = answers[0].shape[1]
        pictures = numbers.multinomial(count, np.full(count, 1 / count), NUM_DRAWS) / count
        drawn += [(pictures @ side.mean(2).T * seeds).sum(1) for side in answers]
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw may have no question that the base answered right
        low, high = np.nanquantile(drawn[0] / drawn[1], (0.025, 0.975))
    return Estimate(float(ours / base), float(low), float(high))


def _by_seed(group: Group) -> dict[int, Run]:
    return {int(run.config["seed"]): run for run in group.finished}


def _families(*groups: Group) -> Iterable[str]:
    """Those that every run of the groups was asked, in the first one's order."""
    asked = [first_split(run) for group in groups for run in group.finished]
    return [name for name in asked[0] if all(name in each for each in asked)] if asked else []


def _answers(runs: Sequence[Run], family: str) -> Bits | None:
    """None where a run does not tell, or they were asked differently many questions."""
    rows = [first_split(run)[family].get("right") for run in runs]
    if None in rows or len({len(row) for row in rows}) != 1:
        return None
    together = TOGETHER.get(family, 1)
    bits = np.array([[mark == "1" for mark in row] for row in rows], dtype=np.float64)
    whole = bits.shape[1] // together * together
    return bits[:, :whole].reshape(len(rows), -1, together) if whole else None
