"""Which rank the others wait for, and by how much: where each one's time goes, compared over those that have the same to do."""

from __future__ import annotations

from statistics import median

from torch import distributed as dist

from megatron_sts.cost.flops import rank_flops
from megatron_sts.runtime.clock import KINDS
from megatron_sts.runtime.dist import all_gather_numbers
from megatron_sts.train.costs import other_s
from megatron_sts.train.metrics import RunLog
from megatron_sts.train.stage import Stage
from megatron_sts.train.step import StepResult
from megatron_sts.train.trace import pipeline_trace

NUM_STEPS_TO_JUDGE = 5
"""Steps whose median says something of a rank."""


class RankTimes:
    """Collects a window of steps, and tells of it at its end.

    Ranks have the same to do if they differ by their samples alone: those of one pipeline, context- and tensor-parallel place.
    """

    def __init__(self, stage: Stage, log: RunLog) -> None:
        self._stage, self._log = stage, log
        self._settings = stage.resolved.config.logging
        self._steps: list[tuple[StepResult, float]] = []

    def step(self, result: StepResult, step_s: float, *, is_last: bool) -> None:
        """Adds this rank's step; a collective where a window ends."""
        if dist.get_world_size() == 1:
            return
        self._steps.append((result, step_s))
        step = result.mask.step
        if not is_last and (step + 1) % self._settings.ranks_interval_steps:
            return
        rows, num_steps = all_gather_numbers(self._row()), len(self._steps)
        self._steps = []
        slowest, share = slowest_rank([(int(row["place"]), row["pass_s"] + row["data_wait_s"]) for row in rows])
        columns = {name: [float(f"{row[name]:.4g}") for row in rows] for name in rows[0] if name != "place"}
        if (traced := pipeline_trace(self._stage)) is not None:
            self._log.trace(self._stage.spec.name, step, traced)
        self._log.event(
            "ranks",
            **{"stage": self._stage.spec.name, "step": step, "steps": num_steps, **columns},
            **{"slowest": slowest, "slower_by": None if slowest is None else round(share, 3)},
        )
        if slowest is not None and num_steps >= NUM_STEPS_TO_JUDGE and share > self._settings.slow_rank_share:
            row = rows[slowest]
            self._log.warn(
                f"stage {self._stage.spec.name}, step {step}: rank {slowest} is {share:.0%} slower than others that do the same: "
                f"{row['pass_s']:.3g} s of passes and {row['data_wait_s']:.3g} s of waiting for data a step (median of {num_steps}); "
                "they wait for it"
            )

    def _row(self) -> dict[str, float]:
        """Of this rank: a number for its place, medians of seconds a step, and rates over the whole window.

        ``tflops`` are those that it executed a second of its steps, ``pass_tflops`` a second of its passes.
        """
        place, steps = self._stage.place, self._steps
        total_s, pass_s = sum(step_s for _, step_s in steps), sum(result.pass_s for result, _ in steps)
        flops = sum(self._flops(result) for result, _ in steps)
        return {
            "place": (place.pp_rank * place.cp_size + place.cp_rank) * place.tp_size + place.tp_rank,
            "pass_s": median(result.pass_s for result, _ in steps),
            "data_wait_s": median(result.data_wait_s for result, _ in steps),
            **{f"{kind}_s": median(result.spent_s[kind] for result, _ in steps) for kind in KINDS},
            "other_s": median(other_s(result.spent_s, step_s) for result, step_s in steps),
            "tokens_per_s": sum(result.own.num_tokens for result, _ in steps) / total_s,
            "images_per_s": sum(result.own.load.num_images for result, _ in steps) / total_s,
            "tflops": flops / total_s / 1e12,
            "pass_tflops": flops / pass_s / 1e12 if pass_s else 0.0,
        }

    def _flops(self, result: StepResult) -> float:
        stage = self._stage
        return rank_flops(stage.resolved, stage.spec, result.own.load, result.layer_runs, pp_rank=stage.place.pp_rank)


def slowest_rank(ranks: list[tuple[int, float]]) -> tuple[int | None, float]:
    """Of each rank (what it has to do, seconds it took): the rank that took longest beside the median of the others with the same
    to do, and by what share longer; None if no two have the same to do."""
    same: dict[int, list[tuple[float, int]]] = {}
    for rank, (work, seconds) in enumerate(ranks):
        same.setdefault(work, []).append((seconds, rank))
    shares = {}
    for taken in same.values():  # of ranks with the same to do only the last can be the slowest of all
        *others, (seconds, rank) = sorted(taken, key=lambda pair: (pair[0], -pair[1]))
        if others and (usual := median(other for other, _ in others)) > 0:
            shares[rank] = seconds / usual - 1
    if not shares:
        return None, 0.0
    slowest = max(shares, key=lambda rank: shares[rank])
    return slowest, shares[slowest]
