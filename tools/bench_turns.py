"""Seconds of training of two runs of a sweep that take turns on this machine: whatever slows it for a while slows both.

    python tools/bench_turns.py SWEEP RUN RUN [--turn-s N] [--out DIR] [--json]

Both are trained as the sweep has them, but for evaluation and logs, and started together; whichever has the smaller share of its steps
done runs, and the other one is stopped (SIGSTOP) with all its processes. A stage's seconds are the mean of its steps times their
number; steps in which a run was stopped are left out of the mean. Linux only.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.config.load import load
from megatron_sts.config.resolve import Resolved
from megatron_sts.config.sweep import SweepRun, config_of, read, runs_of
from megatron_sts.plan.resolved import resolve_planned
from megatron_sts.report.run import METRICS, Run, read_run

SETTINGS = ("evaluation.num_questions=0", "logging.tensorboard=false", "logging.interval_steps=1")
STEPS_A_TURN = 10
"""At least: turns get longer where steps do. A stop falls into long steps more often than into short ones, which would make the mean
of the others too small."""
RECENT_STEPS = 10
"""Whose median says how long steps take now."""
STEPS_IN_SHORTEST_TURN = 2
"""At least, so that a step is not taken for a stop, which is as long as a turn."""
STANDSTILL_S = 600
"""A run that makes no step for so long, while it has its turns, hangs."""
GRACE_S = 60
"""To end in."""


class FailedError(Exception):
    """A run ended with an error."""


@dataclass(frozen=True)
class Timed:
    """A stage of a run."""

    run: str
    stage: str
    num_steps: int
    num_stopped: int
    """Steps that are left out of the mean."""
    step_s: float
    flops_executed: float

    @property
    def seconds(self) -> float:
        return self.step_s * self.num_steps


class Side:
    """One of both runs, with its processes."""

    def __init__(self, config: Path, one: SweepRun, num_steps: int, folder: Path) -> None:
        self.name, self.folder, self._num_steps = one.name, folder, num_steps
        self._log = folder.with_name(f"{folder.name}.log")
        command = [sys.executable, "-m", "megatron_sts", "train", str(config), *one.overrides, *SETTINGS, "--run-dir", str(folder)]  # fmt: skip
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, process_group=0)

    @property
    def is_running(self) -> bool:
        """
        Raises:
            FailedError: it has failed.
        """
        if status := self._process.poll():
            said = self._log.read_text().splitlines() or ["it said nothing"]
            errors = [line for line in said if "error:" in line] or said
            raise FailedError(f"{self.name} failed with status {status}: {errors[-1]}")
        return status is None

    def steps_s(self) -> list[float]:
        """Of each step that is done."""
        metrics = self.folder / METRICS
        lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
        return [json.loads(line)["step_time_s"] for line in lines if '"step_time_s"' in line and line.endswith("\n")]

    @property
    def share(self) -> float:
        """Of its steps that are done."""
        return len(self.steps_s()) / self._num_steps

    def signal(self, number: signal.Signals) -> None:
        """To all its processes, if it still runs."""
        if self._process.poll() is None:
            launcher = psutil.Process(self._process.pid)
            for process in (launcher, *launcher.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(number)

    def wait(self, deadline: float) -> None:
        """Kills it if it has not ended by then; its ranks end with it."""
        try:
            self._process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def end(sides: Sequence[Side]) -> None:
    """Stops for good what still runs."""
    for side in sides:
        side.signal(signal.SIGTERM)
        side.signal(signal.SIGCONT)
    deadline = time.monotonic() + GRACE_S
    for side in sides:
        side.wait(deadline)


def take_turns(sides: Sequence[Side], turn_s: float) -> None:
    """Until both have ended. One runs for a turn, the others are stopped.

    Raises:
        ConfigError: turns are too short.
        FailedError: a run has failed, or hangs.
    """
    told_at = moved_at = time.monotonic()
    shares: list[float] = []
    while going := [side for side in sides if side.is_running]:
        mine = min(going, key=lambda side: side.share)
        for side in going:
            side.signal(signal.SIGCONT if side is mine else signal.SIGSTOP)
        until = time.monotonic() + turn_of(mine, turn_s)
        while time.monotonic() < until and (mine.is_running or len(going) > 1):
            # Also when it ends within its turn: a stop that is shorter than a turn could not be told from a step.
            time.sleep(min(0.1, turn_s))
        for side in going:
            if len(steps_s := side.steps_s()) >= RECENT_STEPS:
                check_turns(side.name, steps_s[-RECENT_STEPS:], turn_s)
        before, shares = shares, [side.share for side in sides]
        now = time.monotonic()
        moved_at = now if shares != before else moved_at
        if now - moved_at > max(STANDSTILL_S, 3 * turn_s):
            raise FailedError(f"{mine.name} has made no step for {now - moved_at:.0f} s")
        if now - told_at > 30:
            told_at = now
            print(", ".join(f"{side.name}: {share:.0%} of its steps" for side, share in zip(sides, shares, strict=True)), file=sys.stderr)  # fmt: skip


def turn_of(side: Side, turn_s: float) -> float:
    """Seconds of a run's next turn, ``turn_s`` at least."""
    recent = side.steps_s()[-RECENT_STEPS:]
    return max(turn_s, STEPS_A_TURN * statistics.median(recent)) if recent else turn_s


def check_turns(name: str, steps_s: Sequence[float], turn_s: float) -> None:
    """
    Raises:
        ConfigError: steps are too long to be told from stops.
    """
    if (median := statistics.median(steps_s)) > turn_s / STEPS_IN_SHORTEST_TURN:
        refuse("--turn-s", f"{turn_s:g}", f"a step of {name} takes {median:.2g} s, which could not be told from a stop",
               f"give {ceil(STEPS_A_TURN * median)}")  # fmt: skip


def timed(run: Run, turn_s: float) -> Iterator[Timed]:
    """Each stage of a run that took turns: a step in which it was stopped took longer than a turn.

    Raises:
        ConfigError: turns were too short.
    """
    for stage, lines in run.steps.items():
        steps_s = [line["step_time_s"] for line in lines]
        counted = [each for each in steps_s if each < turn_s]
        check_turns(f"{stage} of {run.folder.name}", steps_s, turn_s)
        yield Timed(
            run=run.folder.name,
            stage=stage,
            num_steps=len(lines),
            num_stopped=len(lines) - len(counted),
            step_s=statistics.fmean(counted),
            flops_executed=run.total("flops_executed", stage),
        )


def chosen(sweep_file: Path, names: Sequence[str], out: Path) -> list[tuple[SweepRun, Resolved]]:
    """Both runs of the sweep.

    Raises:
        ConfigError: they are not two of its runs with the same stages, or ``out`` has one of them.
    """
    sweep = read(sweep_file)
    runs = {one.name: one for one in runs_of(sweep)}
    for name in names:
        if name not in runs:
            refuse("RUN", name, f"{sweep_file} has no such run", f"give two of {', '.join(runs)}")
        if (out / name).exists():
            refuse("--out", str(out), f"it holds {name}", "give another folder: a run that goes on takes no turns")
    if len(set(names)) < 2:
        refuse("RUN", names[0], "it is given twice", "give two runs")
    found = [(runs[name], resolve_planned(load(config_of(sweep, sweep_file), [*runs[name].overrides, *SETTINGS]))) for name in names]  # fmt: skip
    stages = [[stage.name for stage in resolved.stages] for _, resolved in found]
    if stages[0] != stages[1]:
        refuse("RUN", names[1], f"its stages are {stages[1]}, those of {names[0]} are {stages[0]}", "give runs with the same stages")  # fmt: skip
    return found


def measure(sweep_file: Path, names: Sequence[str], out: Path, turn_s: float) -> list[list[Timed]]:
    """Of each run its stages.

    Raises:
        ConfigError: see ``chosen``; or turns are too short.
        FailedError: a run has failed, or hangs.
    """
    both = chosen(sweep_file, names, out)
    config = config_of(read(sweep_file), sweep_file)
    out.mkdir(parents=True, exist_ok=True)
    sides: list[Side] = []
    try:
        for one, resolved in both:
            sides.append(Side(config, one, sum(stage.num_steps for stage in resolved.stages), out / one.name))
        take_turns(sides, turn_s)
    finally:
        end(sides)
    return [list(timed(read_run(side.folder), turn_s)) for side in sides]


def warnings(found: Sequence[Sequence[Timed]], turn_s: float) -> Iterator[str]:
    """Where a run was stopped in none of its steps: it had its time in one piece, as if it had run alone."""
    for stages in found:
        if not any(each.num_stopped for each in stages):
            yield f"{stages[0].run} was stopped in no step: it took no turns; give less than --turn-s {turn_s:g}, or runs with more steps"


def show(found: Sequence[Sequence[Timed]]) -> None:
    """A row a stage, and all together; the last columns are the second run's beside the first's."""
    first, second = found
    table = Table(
        "",
        f"{first[0].run}, s",
        f"{second[0].run}, s",
        "of the time",
        "of the FLOPs",
        "times as fast",
        "steps left out",
    )
    for name, ours, theirs in [*((a.stage, [a], [b]) for a, b in zip(first, second, strict=True)), ("all", first, second)]:  # fmt: skip
        seconds = [sum(each.seconds for each in stages) for stages in (ours, theirs)]
        flops = [sum(each.flops_executed for each in stages) for stages in (ours, theirs)]
        share = seconds[1] / seconds[0]
        left_out = " and ".join(str(sum(each.num_stopped for each in stages)) for stages in (ours, theirs))
        table.add_row(name, *(f"{each:.1f}" for each in seconds), f"{share:.3f}", f"{flops[1] / flops[0]:.3f}", f"{1 / share:.2f}", left_out)  # fmt: skip
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", metavar="SWEEP", type=Path, help="a sweep's YAML file")
    parser.add_argument("runs", metavar="RUN", nargs=2, help="two of its runs, as its --dry-run names them")
    parser.add_argument(
        "--turn-s",
        type=float,
        default=10.0,
        help="seconds that one of both runs at a time, longer where ten of its steps take longer (default: 10)",
    )
    parser.add_argument("--out", type=Path, help="where the runs are written and kept")
    parser.add_argument("--json", action="store_true", help="print one JSON list of both runs' stages")
    args = parser.parse_args()
    if not 0 < args.turn_s < float("inf"):
        parser.error(f"--turn-s={args.turn_s:g}: no time at all; give seconds, for example 10")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # runs that are stopped must not stay behind
    with tempfile.TemporaryDirectory() as kept_not:
        try:
            found = measure(args.sweep, args.runs, args.out or Path(kept_not), args.turn_s)
        except ConfigError as error:
            parser.error(str(error))
        except FailedError as error:
            sys.exit(f"{parser.prog}: error: {error}")
    for warning in warnings(found, args.turn_s):
        print(f"{parser.prog}: warning: {warning}", file=sys.stderr)
    if args.json:
        print(json.dumps([[asdict(each) | {"seconds": each.seconds} for each in stages] for stages in found]))
    else:
        show(found)


if __name__ == "__main__":
    main()
