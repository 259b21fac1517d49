"""What a run's steps took beside what ``plan`` predicts on given hardware. Knows no page, no figure and no model of hardware."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_sts.report.run import Line, Run

Planned = Mapping[str, Any]
"""What ``megatron-sts plan --json`` has under ``time``."""
PARTS = ("passes", "pipeline wait", "communication", "optimizer", "rest")
"""Of a step, in the mean over ranks; passes with the collectives within them."""
SHARES = ("share of waiting for the pipeline",)
"""Of what is planned, those whose uncertainty is not that of seconds."""
FIRST_STEPS = 1
"""Left out: it allocates, and waits for what was not read ahead."""


@dataclass(frozen=True)
class Beside:
    """Of one stage, in the mean over its steps."""

    measured: dict[str, float | None]
    """By name; None where the run did not know it."""
    planned: dict[str, float]
    measured_parts_s: dict[str, float]
    planned_parts_s: dict[str, float]
    uncertainty: float
    """The model's own, relative: of planned seconds, and of what is told a second."""
    planned_range_s: tuple[float, float]
    """Of a step, by that."""


def beside_plan(run: Run, planned: Planned) -> dict[str, Beside]:
    """The stages that ran for more than a step, with a version that tells where the time goes."""
    found = {}
    for stage, lines in run.steps.items():
        timed = [line for line in lines[FIRST_STEPS:] if "forward_s" in line]
        if timed and stage in planned["stages"]:
            plan, ranks = planned["stages"][stage], run.config["resolved"]["world_size"]
            found[stage] = Beside(
                measured=_measured(timed, ranks),
                planned=_predicted(plan),
                measured_parts_s=_measured_parts(timed),
                planned_parts_s=_predicted_parts(plan),
                uncertainty=plan["uncertainty"],
                planned_range_s=tuple(plan["step_time_s_range"]),
            )
    return found


def _measured(lines: list[Line], num_ranks: int) -> dict[str, float | None]:
    seconds = _sum(lines, "step_time_s")
    has_mfu = all(line["mfu"] is not None for line in lines)
    return {
        "seconds a step": seconds / len(lines),
        "tokens/s a device, padding included": _sum(lines, "padded_tokens") / seconds / num_ranks,
        "images/s": _sum(lines, "images") / seconds,
        "TFLOP/s a device": _sum(lines, "flops_executed") / seconds / num_ranks / 1e12,
        "MFU": sum(line["mfu"] * line["step_time_s"] for line in lines) / seconds if has_mfu else None,
        SHARES[0]: _sum(lines, "pipeline_wait_s") / seconds,
    }


def _predicted(plan: Mapping[str, Any]) -> dict[str, float]:
    seconds = plan["step_time_s"]
    return {
        "seconds a step": seconds,
        "tokens/s a device, padding included": plan["tokens_per_s_per_gpu"],
        "images/s": plan["images_per_s"],
        "TFLOP/s a device": plan["tflops_per_gpu"]["causal_half"],
        "MFU": plan["mfu"],
        SHARES[0]: plan["bubble"] * plan["split_s"]["pipeline"] / seconds,
    }


def _measured_parts(lines: list[Line]) -> dict[str, float]:
    fields = (
        ("forward_s", "backward_s", "layer_communication_s"),
        ("pipeline_wait_s",),
        ("communication_s",),
        ("optimizer_s",),
        ("data_s", "other_s"),
    )
    seconds = (sum(_sum(lines, field) for field in each) / len(lines) for each in fields)
    return dict(zip(PARTS, seconds, strict=True))


def _predicted_parts(plan: Mapping[str, Any]) -> dict[str, float]:
    split, bubble = plan["split_s"], plan["bubble"]
    moved = split["gradient_reduction"] + split["parameter_gather"]
    seconds = (split["pipeline"] * (1 - bubble), split["pipeline"] * bubble, moved, split["optimizer"], 0.0)
    return dict(zip(PARTS, seconds, strict=True))


def _sum(lines: list[Line], field: str) -> float:
    return sum(line[field] for line in lines)
