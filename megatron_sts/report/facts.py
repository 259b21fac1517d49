"""What a stage's steps took, in the numbers that rules ask for. Knows no rule, no page and no model of hardware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sts.report.fields import BETWEEN, PARTS
from megatron_sts.report.planned import FIRST_STEPS, Planned
from megatron_sts.report.run import Line, Run


@dataclass(frozen=True)
class Facts:
    """Of one stage, in the mean over its steps but the first one, and over ranks."""

    stage: str
    num_steps: int
    """That the means are of."""
    parts_s: Mapping[str, float]
    """Seconds a step by field of ``fields.PARTS``, and what training stood still for checkpoints; together all the time there was."""
    padding_share: float
    """Of the tokens that were computed."""
    pass_mfu: float | None
    """The model's FLOPs in the seconds of forward and backward passes, over the device's peak; None where that is not known."""
    load_spread: float
    """How much more FLOPs than the mean the data-parallel copy with most of them had."""
    in_fp8: bool
    """Whether that is the peak of FP8, in which the decoder multiplies."""
    reads_late_s: float
    """A step: the longest that a rank waited for its samples to be read."""
    slowest: tuple[int, float] | None
    """Of ranks that have the same to do the one that took longest, and seconds a step that the others wait for it; None: no two have."""
    num_microbatches: int
    config: Mapping[str, Any]
    """The run's, with derived values."""
    settings: Mapping[str, Any]
    """The stage's part of it."""
    plan: Mapping[str, Any] | None
    """Of ``plan --json`` for the stage, if hardware was given."""

    @property
    def total_s(self) -> float:
        """Of a step, checkpoints included."""
        return sum(self.parts_s.values())

    @property
    def pass_s(self) -> float:
        """Of a step, without collectives within passes."""
        return self.parts_s["forward_s"] + self.parts_s["backward_s"]

    @property
    def pp_size(self) -> int:
        """Pipeline ranks."""
        return int(self.config["parallel"]["pipeline_model_parallel_size"])


NEEDED = (
    *PARTS,
    BETWEEN,
    "data_wait_s",
    "tokens",
    "padded_tokens",
    "num_microbatches",
    "flops_executed",
    "mfu",
    "tflops_per_device",
)
"""Fields of lines, which earlier versions wrote without some of them."""


def facts_of(run: Run, planned: Planned | None) -> list[Facts]:
    """Of the stages that ran for more than a step, with a version that tells where the time goes."""
    found = []
    for stage, lines in run.steps.items():
        timed = [line for line in lines[FIRST_STEPS:] if all(field in line for field in NEEDED)]
        if timed:
            # Checkpoints are told of all steps since the line before; the other seconds are of the line's step alone.
            num_covered = timed[-1]["step"] - lines[lines.index(timed[0]) - 1]["step"]
            parts_s = {part: _sum(timed, part) / len(timed) for part in PARTS}
            settings = next(each for each in run.config["stages"] if each["name"] == stage)
            found.append(
                Facts(
                    stage=stage,
                    num_steps=len(timed),
                    parts_s={**parts_s, BETWEEN: _sum(timed, BETWEEN) / num_covered},
                    padding_share=1 - _sum(timed, "tokens") / _sum(timed, "padded_tokens"),
                    pass_mfu=_pass_mfu(timed, run.config["resolved"]["world_size"]),
                    load_spread=sum(line.get("load_spread", 1.0) for line in timed) / len(timed),
                    in_fp8=_in_fp8(timed[-1], run.config),
                    reads_late_s=_sum(timed, "data_wait_s") / len(timed),
                    slowest=_slowest(run.ranks.get(stage)),
                    num_microbatches=timed[-1]["num_microbatches"],
                    config=run.config,
                    settings=settings,
                    plan=None if planned is None else planned["stages"].get(stage),
                )
            )
    return found


def _pass_mfu(lines: list[Line], num_ranks: int) -> float | None:
    """The peak is what a line's rate and its MFU come from; steps of few tokens may have that of another format."""
    pass_s = _sum(lines, "forward_s") + _sum(lines, "backward_s")
    if not pass_s or not all(line["mfu"] for line in lines):
        return None
    at_peak_s = (line["flops_executed"] / 1e12 * line["mfu"] / line["tflops_per_device"] for line in lines)
    return float(sum(at_peak_s) / pass_s / num_ranks)


def _in_fp8(line: Line, config: Mapping[str, Any]) -> bool:
    """Lines of earlier versions do not tell it."""
    return bool(line.get("in_fp8", config["precision"]["fp8"] not in ("off", "emulate", False)))


def _slowest(ranks: Line | None) -> tuple[int, float] | None:
    if ranks is None or ranks.get("slowest") is None:
        return None
    rank, share = ranks["slowest"], ranks["slower_by"]
    took_s = ranks["pass_s"][rank] + ranks["data_wait_s"][rank]
    return rank, took_s - took_s / (1 + share)


def _sum(lines: list[Line], field: str) -> float:
    return float(sum(line[field] for line in lines))
