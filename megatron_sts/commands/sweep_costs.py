"""What a sweep's runs are to execute, and how long that takes at the pace of those that are finished. Trains nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from megatron_sts.commands.expected import stages_of
from megatron_sts.commands.sweep_folders import unasked
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.resolve import Resolved
from megatron_sts.report.run import Run, read_run


@dataclass(frozen=True)
class Pace:
    """Of finished runs, in the mean."""

    flops_per_s: float
    """Within steps."""
    evaluation_s: float
    """Of a run."""
    num_runs: int


def planned_flops(resolved: Resolved) -> float:
    """Of a whole run's steps: tokens that VTC keeps, layers that run by LDS's probabilities, rows being full."""
    steps = {stage.name: stage.num_steps for stage in resolved.stages}
    return sum(stage.flops for stage in stages_of(resolved, steps).values())


def trained(resolved: Resolved, folder: Path) -> Run | None:
    """What ``folder`` holds, if that is all steps of the run; else None."""
    try:
        run = read_run(folder)
    except ConfigError:
        return None
    had = [(stage["name"], stage["num_steps"]) for stage in run.config["resolved"]["stages"]]
    is_whole = run.is_complete and had == [(stage.name, stage.num_steps) for stage in resolved.stages]
    return run if is_whole else None


def pace_of(runs: Sequence[Run]) -> Pace | None:
    """None without any."""
    if not runs:
        return None
    flops, seconds = (sum(run.total(field) for run in runs) for field in ("flops_executed", "step_time_s"))
    asked = [0.0 if run.evaluation is None else float(run.evaluation["seconds"]) for run in runs]
    return Pace(flops / seconds, fmean(asked), len(runs))


def told(runs: Sequence[Resolved], folders: Sequence[Path], jobs: int, gflops_per_s: float | None) -> str:
    """A sentence: FLOPs of all runs, and minutes of those that are not finished, if a pace is known or given."""
    done = [trained(run, folder) for run, folder in zip(runs, folders, strict=True)]
    left = [
        planned_flops(run) if found is None else 0.0  # only its questions are left
        for run, found, folder in zip(runs, done, folders, strict=True)
        if found is None or unasked(run, folder)
    ]
    pace = pace_of([run for run in done if run is not None])
    said = f"{len(left)} of them not finished, {sum(left):.3g} FLOPs"
    if not left:
        return "all of them finished"
    jobs = min(jobs, len(left))
    if gflops_per_s is not None:
        seconds = sum(left) / (gflops_per_s * 1e9)
        return f"{said}; {minutes(seconds / jobs)} of training at {gflops_per_s:g} GFLOP/s a run, {jobs} at a time, without starts and evaluation"
    if pace is None:
        return f"{said}; minutes are told once one is finished, or for --gflops"
    seconds = sum(left) / pace.flops_per_s + len(left) * pace.evaluation_s
    return f"{said}; {minutes(seconds / jobs)} at the pace of {pace.num_runs} finished ones ({pace.flops_per_s / 1e9:.3g} GFLOP/s), {jobs} at a time, without starts"


def minutes(seconds: float) -> str:
    """About so many."""
    return f"about {max(1, round(seconds / 60)):,} min"
