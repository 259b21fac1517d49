"""What measuring costs: the share of a step that its timers, its line and the collectives for that take.

    python tools/bench_timers.py [CONFIG [key.path=value ...]] [--steps N] [--json]

A step with its timers beside one without would have to be told apart by a thousandth. So the timed spans of real steps are
counted, on as many local ranks as CONFIG asks for, and what a span takes is measured alone, many in a row; the line and the ranks'
means, which are made once a step at most, are timed as they are. Shown is the largest share of any rank.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_sts.config.load import load
from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.model.init import build_model
from megatron_sts.runtime.clock import StepClock
from megatron_sts.runtime.device import current_device
from megatron_sts.runtime.dist import max_over_ranks, process_group
from megatron_sts.train.costs import StepCosts, StepTimes
from megatron_sts.train.loop import mean_times
from megatron_sts.train.stage import Stage, build_stage
from megatron_sts.train.step import StepResult, train_step

ROOT = Path(__file__).resolve().parents[1]
NUM_SPANS, NUM_ROUNDS = 1000, 25
"""In a row, and how often: the median counts."""
FIRST_STEPS = 3


def span_s() -> float:
    """One timed span, its part of ``take`` included."""

    def spans() -> None:
        clock = StepClock()
        for _ in range(NUM_SPANS):
            with clock.running("forward"):
                pass
        clock.take()

    return median_s(spans) / NUM_SPANS


def median_s(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    found = []
    for _ in range(NUM_ROUNDS):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def measure(stage: Stage, num_steps: int) -> dict[str, float]:
    """A stage's steps; the largest numbers of any rank."""
    counts, seconds = [], []
    for step in range(num_steps):
        started = time.perf_counter()
        result, num_spans = counted(stage, step)
        current_device().synchronize()
        seconds.append(time.perf_counter() - started)
        counts.append(num_spans)
    step_s, costs = statistics.median(seconds[FIRST_STEPS:]), StepCosts(stage.resolved, stage.spec)

    def line() -> None:
        spent_s, mean_s = mean_times(result, step_s)
        costs.describe(result, StepTimes(step_s, 0.0, spent_s, mean_s, 0.0), 0, costs.of_copy(result))

    timers_s, line_s = statistics.median(counts) * span_s(), median_s(line)
    numbers = [statistics.median(counts), step_s, timers_s / step_s, line_s / step_s]
    return dict(zip(("num_spans", "step_s", "timers_share", "line_share"), max_over_ranks(numbers), strict=True))


def counted(stage: Stage, step: int) -> tuple[StepResult, int]:
    """A step, and how many spans were timed in it."""
    found, take = [], stage.clock.take

    def counting() -> Any:
        found.append(len(stage.clock._spans))
        return take()

    stage.clock.take = counting  # type: ignore[method-assign]
    result = train_step(stage, step)
    stage.clock.take = take  # type: ignore[method-assign]
    return result, found[0]


def run_rank(resolved: Resolved, num_steps: int) -> dict[str, Any]:
    """What each rank does; of all ranks, on every one."""
    with process_group(600.0):
        place, gate = groups.initialize(resolved.config.parallel, resolved.config.seed), SkipGate()
        chunks, found = build_model(resolved, gate), {}
        for spec in resolved.stages:
            stage = build_stage(resolved, spec, place, chunks, gate)
            found[spec.name] = measure(stage, num_steps)
            stage.close()
        return {"device": current_device().name, "ranks": resolved.world_size, "stages": found}


def start_ranks(args: argparse.Namespace, num_ranks: int) -> dict[str, Any]:
    """The same on local ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    words = [*launcher, __file__, str(args.config), *args.overrides, "--rank", f"--steps={args.steps}", "--json"]
    told: dict[str, Any] = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", default=ROOT / "examples/quickstart")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    parser.add_argument("--steps", type=int, default=12, help=f"a stage; the first {FIRST_STEPS} do not count")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    steady = ["stages.*.epochs=null", "stages.*.optimizer.warmup_steps=0", f"stages.*.steps={args.steps}"]
    resolved = resolve(load(args.config, [*steady, *args.overrides]))
    is_rank = args.rank or resolved.world_size == 1
    told = run_rank(resolved, args.steps) if is_rank else start_ranks(args, resolved.world_size)
    if args.json:
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(told))
        return
    for name, row in told["stages"].items():
        print(
            f"{name}: step {row['step_s']:.4g} s, {row['num_spans']:g} spans take {row['timers_share']:.4%} of it, "
            f"the line {row['line_share']:.4%}"
        )


if __name__ == "__main__":
    main()
