"""Seconds of training of two runs of a sweep that take turns on this machine: whatever slows it for a while slows both.

    python tools/bench_turns.py SWEEP RUN RUN [--turn-s N] [--out DIR] [--json]

Both are trained as the sweep has them, but for their evaluation, and started together; whichever has the smaller share of its steps done
runs, and the other one is stopped (SIGSTOP) with all its processes. A stage's seconds are the mean of its steps times their number;
steps in which a run was stopped are left out of the mean.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.config.load import load
from megatron_sts.config.resolve import resolve
from megatron_sts.config.sweep import SweepRun, config_of, read, runs_of
from megatron_sts.report.run import METRICS, Run, read_run

SETTINGS = ("evaluation.num_questions=0", "logging.tensorboard=false", "logging.interval_steps=1")
TURNS_A_STEP = 4
"""A turn is to be so many times as long as the steps: else most steps would be stopped in."""


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

    def __init__(self, config: Path, one: SweepRun, folder: Path) -> None:
        overrides = [*one.overrides, *SETTINGS]
        self.name, self.folder = one.name, folder
        self._num_steps = sum(stage.num_steps for stage in resolve(load(config, overrides)).stages)
        self._log = folder.with_suffix(".log")
        command = [sys.executable, "-m", "megatron_sts", "train", str(config), *overrides, "--run-dir", str(folder)]
        with self._log.open("w") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    @property
    def is_running(self) -> bool:
        """
        Raises:
            FailedError: it has failed.
        """
        if status := self._process.poll():
            said = self._log.read_text().splitlines() or ["it said nothing"]
            raise FailedError(f"{self.name} failed with status {status}: {said[-1]}")
        return status is None

    @property
    def share(self) -> float:
        """Of its steps that are done."""
        metrics = self.folder / METRICS
        lines = metrics.read_text().count('"loss":') if metrics.is_file() else 0
        return lines / self._num_steps

    def signal(self, number: signal.Signals) -> None:
        for process in descendants(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(process, number)

    def end(self) -> None:
        """Stops it for good, if it still runs."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            self.signal(signal.SIGCONT)
            try:
                self._process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self._process.kill()


def descendants(process: int) -> Iterator[int]:
    """A process, and all that it and its children started."""
    yield process
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):  # it has ended
            for child in children.read_text().split():
                yield from descendants(int(child))


def take_turns(sides: Sequence[Side], turn_s: float) -> None:
    """Until both have ended. One runs for a turn, the others are stopped."""
    told_at = time.monotonic()
    while going := [side for side in sides if side.is_running]:
        mine = min(going, key=lambda side: side.share)
        for side in going:
            side.signal(signal.SIGCONT if side is mine else signal.SIGSTOP)
        until = time.monotonic() + turn_s
        while time.monotonic() < until and mine.is_running:
            time.sleep(min(0.1, turn_s))
        if time.monotonic() - told_at > 30:
            told_at = time.monotonic()
            print(", ".join(f"{side.name}: {side.share:.0%} of its steps" for side in sides), file=sys.stderr)


def timed(run: Run, turn_s: float) -> Iterator[Timed]:
    """Each stage of a run that took turns: a step in which it was stopped took longer than a turn.

    Raises:
        ConfigError: turns are too short to tell.
    """
    for stage, lines in run.steps.items():
        steps_s = [line["step_time_s"] for line in lines]
        counted = [each for each in steps_s if each < turn_s]
        if (median := statistics.median(steps_s)) > turn_s / TURNS_A_STEP:
            refuse("--turn-s", f"{turn_s:g}", f"steps of {stage} of {run.folder.name} took {median:.2g} s",
                   f"give {TURNS_A_STEP} times as much at least")  # fmt: skip
        yield Timed(
            run=run.folder.name,
            stage=stage,
            num_steps=len(lines),
            num_stopped=len(lines) - len(counted),
            step_s=statistics.fmean(counted),
            flops_executed=run.total("flops_executed", stage),
        )


def measure(sweep_file: Path, names: Sequence[str], out: Path, turn_s: float) -> list[list[Timed]]:
    """Of each run its stages.

    Raises:
        ConfigError: the sweep has no such run, or turns are too short.
        FailedError: a run has failed.
    """
    sweep = read(sweep_file)
    runs = {one.name: one for one in runs_of(sweep)}
    for name in names:
        if name not in runs:
            refuse("RUN", name, f"{sweep_file} has no such run", f"give two of {', '.join(runs)}")
    out.mkdir(parents=True, exist_ok=True)
    sides: list[Side] = []
    try:
        for name in names:
            if (out / name).exists():
                refuse("--out", str(out), f"it holds {name}", "give another folder: a run that goes on takes no turns")
            sides.append(Side(config_of(sweep, sweep_file), runs[name], out / name))
        take_turns(sides, turn_s)
    finally:
        for side in sides:
            side.end()
    return [list(timed(read_run(side.folder), turn_s)) for side in sides]


def show(found: Sequence[Sequence[Timed]]) -> None:
    """A row a stage, and both together; the last two columns are the second run's beside the first's."""
    first, second = found
    table = Table("", f"{first[0].run}, s", f"{second[0].run}, s", "of the time", "of the FLOPs", "times as fast")
    for name, ours, theirs in [*((a.stage, [a], [b]) for a, b in zip(first, second, strict=True)), ("both", first, second)]:  # fmt: skip
        seconds = [sum(each.seconds for each in stages) for stages in (ours, theirs)]
        flops = [sum(each.flops_executed for each in stages) for stages in (ours, theirs)]
        share = seconds[1] / seconds[0]
        table.add_row(name, *(f"{each:.1f}" for each in seconds), f"{share:.3f}", f"{flops[1] / flops[0]:.3f}", f"{1 / share:.2f}")  # fmt: skip
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", metavar="SWEEP", type=Path, help="a sweep's YAML file")
    parser.add_argument("runs", metavar="RUN", nargs=2, help="two of its runs, as its --dry-run names them")
    parser.add_argument(
        "--turn-s", type=float, default=5.0, help="seconds that one of both runs at a time (default: 5)"
    )
    parser.add_argument("--out", type=Path, help="where the runs are written and kept")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as kept_not:
        try:
            found = measure(args.sweep, args.runs, args.out or Path(kept_not), args.turn_s)
        except (ConfigError, FailedError) as error:
            parser.error(str(error))
    if args.json:
        print(json.dumps([[asdict(each) | {"seconds": each.seconds} for each in stages] for stages in found]))
    else:
        show(found)


if __name__ == "__main__":
    main()
