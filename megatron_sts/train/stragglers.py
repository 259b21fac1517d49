"""Which rank the others wait for, and by how much: where each one's time goes, compared over those that have the same to do."""

from __future__ import annotations

from statistics import median

import torch
from torch import distributed as dist

from megatron_sts.runtime.device import current_device
from megatron_sts.train.metrics import RunLog
from megatron_sts.train.stage import Stage

NUM_STEPS_TO_JUDGE = 5
"""Steps whose median says something of a rank."""


class RankTimes:
    """Collects a window of steps, and tells of it at its end.

    Ranks have the same to do if they differ by their samples alone: those of one pipeline and tensor-parallel place.
    """

    def __init__(self, stage: Stage, log: RunLog) -> None:
        self._name, self._place, self._log = stage.spec.name, stage.place, log
        self._settings = stage.resolved.config.logging
        self._steps: list[tuple[float, float, float]] = []

    def step(self, step: int, pass_s: float, data_wait_s: float, step_time_s: float, *, is_last: bool) -> None:
        """Adds this rank's step; a collective where a window ends."""
        if dist.get_world_size() == 1:
            return
        self._steps.append((pass_s, data_wait_s, step_time_s))
        if not is_last and (step + 1) % self._settings.ranks_interval_steps:
            return
        of_ranks = self._gather()
        num_steps, self._steps = len(self._steps), []
        passes, data, waits = ([round(row[column], 6) for row in of_ranks] for column in range(3))
        slowest, share = slowest_rank([(int(row[3]), row[0] + row[1]) for row in of_ranks])
        self._log.event(
            "ranks",
            **{"stage": self._name, "step": step, "steps": num_steps, "pass_s": passes, "data_wait_s": data},
            **{"other_s": waits, "slowest": slowest, "slower_by": None if slowest is None else round(share, 3)},
        )
        if slowest is not None and num_steps >= NUM_STEPS_TO_JUDGE and share > self._settings.slow_rank_share:
            self._log.warn(
                f"stage {self._name}, step {step}: rank {slowest} is {share:.0%} slower than others that do the same: {passes[slowest]:.3g} s of "
                f"passes and {data[slowest]:.3g} s of waiting for data a step (median of {num_steps}); they wait for it"
            )

    def _gather(self) -> list[list[float]]:
        """Of each rank: medians of seconds a step in passes, waiting for its data, and in everything else, and a number for its
        place; a collective."""
        pass_s, data_s, step_s = (median(values) for values in zip(*self._steps, strict=True))
        place = self._place.pp_rank * self._place.tp_size + self._place.tp_rank
        mine = torch.tensor([pass_s, data_s, max(0.0, step_s - pass_s - data_s), place], dtype=torch.float64)
        mine = mine.to(current_device().torch_device)
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(found, mine)
        return [each.tolist() for each in found]


def slowest_rank(ranks: list[tuple[int, float]]) -> tuple[int | None, float]:
    """Of each rank (what it has to do, seconds it took): the rank that took longest beside the median of the others with the same
    to do, and by what share longer; None if no two have the same to do."""
    shares = {}
    for rank, (work, seconds) in enumerate(ranks):
        others = [taken for other, (same, taken) in enumerate(ranks) if same == work and other != rank]
        if others and median(others) > 0:
            shares[rank] = seconds / median(others) - 1
    if not shares:
        return None, 0.0
    slowest = max(shares, key=lambda rank: shares[rank])
    return slowest, shares[slowest]
