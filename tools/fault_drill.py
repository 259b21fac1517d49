"""Injects faults into small real runs, and asserts who is named, how soon, what is left running, and what the same command makes of it.

    python tools/fault_drill.py [--count 100] [--kinds NAME ...] [--seed 0] [--out runs/fault_drill] [--json] [--report FILE.md]

Runs train a tiny model for twelve steps, saving every third, on two gloo ranks that our launcher forks: two pipeline ranks of two
chunks each, with layers skipped by rounds (two replicas, prepared shards and pictures for the kinds that need them). Each trial is
one fault of one kind, at a moment that the seed decides; kinds take turns. A trial passes if

- the one line of the error is about the right rank and the right cause, within parallel.timeout_s + 10 s;
- the launcher's exit status is what it should be, and no process of the run is left;
- the same command, started again, goes on and ends with every step's numbers and every weight, moment and random state of the
  last checkpoint as in a run that nobody disturbed, to the last bit.

Ends with status 1 if not all trials pass. Each start has a time limit of its own: a hang is a failed trial. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from faults.moments import STALL_S
from faults.runs import HERE, LEFT_S, Start, config, in_child, left_over, write_data
from rich.console import Console
from rich.table import Table

from megatron_sts.launch import fork, outcome

if TYPE_CHECKING:
    from faults.kinds import Kind
    from faults.moments import Moment

BOUND_S = 10.0
"""After ``parallel.timeout_s`` a run has so long to end."""
START_S = 60.0
"""A start, and a whole run, have so long."""
CALM_S = 60.0
"""``parallel.timeout_s`` of runs in which no rank stalls."""
PR_SET_CHILD_SUBREAPER = 36
"""Of Linux's prctl: orphans of runs become children of this process."""
MODULES = (
    "megatron_sts.commands.train",
    "megatron_sts.train.loop",
    "megatron_sts.data.energon",
    "torch._dynamo",
    "faults.kinds",
    "kill_drill",
)


@dataclass
class Trial:
    """What came of one fault."""

    kind: str
    seed: int
    rank: int
    place: str
    seconds: float | None = None
    """From the fault to the line that names it; where nobody is left to say it, to the end of the last process."""
    said: str = ""
    wrong: list[str] = field(default_factory=list)
    """What was not as it should be."""
    is_hang: bool = False
    lost_steps: int | None = None
    """Of those that were done, the ones done again."""
    took_s: float = 0.0


class Drill:
    """All trials, in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._whole: dict[str, Path] = {}

    def whole(self, name: str) -> Path:
        """The folder whose ``run`` nobody disturbed."""
        if name not in self._whole:
            folder = self.folder / name
            folder.mkdir(parents=True)
            if name in ("prepared", "pictures"):
                in_child(lambda: write_data(folder, prepared=name == "prepared"))
            self._whole[name] = folder
            start = self._start(name, folder, CALM_S, "log")
            if not start.wait(2 * START_S) or start.status:
                raise SystemExit(f"the undisturbed run failed: {start.log}")
            left_over()
        return self._whole[name]

    def _start(
        self, name: str, folder: Path, timeout_s: float, log: str, plant: Callable[[], None] = lambda: None
    ) -> Start:
        written = folder / f"config.{timeout_s:g}.yaml"
        data = folder if (folder / "data").exists() else self._whole[name]
        written.write_text(yaml.safe_dump(config(name, data, timeout_s)))
        return Start(written, folder / "run", folder / log, plant)

    def trial(self, kind: Kind, number: int, seed: int) -> Trial:
        """One fault, and what the same command makes of it."""
        began, numbers = time.monotonic(), random.Random(f"{kind.name} {seed}")
        whole = self.whole(kind.config)
        folder = self.folder / f"{number:03d}-{kind.name}"
        folder.mkdir()
        moment = kind.draw(numbers, folder / "fault")
        result = Trial(kind.name, seed, moment.rank, f"step {moment.step}, {moment.phase}")
        if kind.damage is not None:
            shutil.copytree(whole, folder, dirs_exist_ok=True)
            if kind.then == "ends":
                shutil.rmtree(folder / "run")
            else:
                outcome.clear(folder / "run")
                shutil.rmtree(folder / "run" / "checkpoints" / "0-finetune-0000012")
            kind.damage(folder / "run", numbers)
        self._disturb(kind, folder, moment, result)
        result.wrong += [f"left running: {each}" for each in left_over()]
        if not result.is_hang:
            self._go_on(kind, folder, whole, result)
        result.took_s = round(time.monotonic() - began, 1)
        return result

    def _disturb(self, kind: Kind, folder: Path, moment: Moment, result: Trial) -> None:
        """The start that meets the fault, to its end."""
        timeout_s = STALL_S if kind.stalls else CALM_S
        plant = (lambda: None) if kind.plant is None else partial(kind.plant, moment)
        starts = [self._start(kind.config, folder, timeout_s, "log", plant)]
        start, expected = starts[0], re.compile(pattern_of(kind, moment.rank))

        def again() -> None:
            starts.append(self._start(kind.config, folder, timeout_s, "log.other"))

        def is_said() -> bool:
            return bool(kind.says and any(expected.search(each.text()) for each in starts))

        at = start.began
        if kind.plant is not None:
            start.wait(START_S, moment.said_in.exists)
            if moment.said_in.exists():
                at = float(moment.said_in.read_text())
            else:
                result.wrong.append("its moment did not come")
        if kind.strike is not None:
            time.sleep(moment.delay_s)
            at = time.time()
            strike(kind, start, folder / "run", moment, again)
        limit_s = (timeout_s if kind.stalls else 0) + (START_S if kind.status == 0 else 2 * BOUND_S)
        if start.wait(limit_s, is_said) and is_said():
            result.seconds = round(time.time() - at, 2)
        result.is_hang = not start.wait(limit_s)
        if not kind.says and kind.status < 0:
            result.seconds = round(time.time() - at, 2)
        if result.is_hang:
            result.wrong.append(f"hang: it had not ended {time.time() - at:.0f} s after the fault")
            os.kill(start.pid, signal.SIGKILL)
            start.wait(LEFT_S)
        for other in starts[1:]:
            if not other.wait(LEFT_S) or other.status != 2:
                result.wrong.append(f"the second start ended with {other.status}, not 2")
        judge(kind, starts, expected, result)

    def _go_on(self, kind: Kind, folder: Path, whole: Path, result: Trial) -> None:
        """The same command again, if the run is not done; what came of it in the end."""
        from kill_drill import differences, lines

        run_dir = folder / "run"
        before = [line["step"] for line in lines(run_dir) if "loss" in line]
        found = outcome.read(run_dir)
        is_done = found is not None and found.outcome == "done"
        if is_done != kind.is_done:
            result.wrong.append(f"outcome.json: {found}")
        if kind.then == "refused":
            return
        if not is_done:
            start = self._start(kind.config, folder, CALM_S, "log.again")
            if not start.wait(START_S) or start.status:
                result.wrong.append(f"the same command did not go on: {start.status}, {start.text()[-300:]}")
            result.wrong += [f"left running: {each}" for each in left_over()]
            if start.status != 0:
                return
            done = [line["step"] for line in lines(run_dir) if "loss" in line][len(before) :]
            result.lost_steps = len(set(done) & set(before))
        if kind.then == "same":
            result.wrong += [f"otherwise than undisturbed: {each}" for each in differences(whole / "run", run_dir)[:5]]


def strike(kind: Kind, start: Start, run_dir: Path, moment: Moment, again: Callable[[], None]) -> None:
    """From outside, if the run is still there."""
    from faults.moments import Running
    from kill_drill import children

    if start.poll() is None and kind.strike is not None:
        ranks = [] if kind.plant is None else children(start.pid)
        kind.strike(Running(start.pid, ranks, run_dir, moment, again))


def judge(kind: Kind, starts: Sequence[Start], expected: re.Pattern[str], result: Trial) -> None:
    """What was said, how soon, and how it ended."""
    ours = [line for each in starts for line in each.text().splitlines() if line.startswith("megatron-sts: ")]
    errors = [line for line in ours if line.startswith("megatron-sts: error: ")]
    told = [line for line in ours if expected.search(line)] if kind.says else []
    if starts[0].status != kind.status:
        result.wrong.append(f"exit status {starts[0].status}, not {kind.status}")
    if kind.says and not told:
        result.wrong.append(f"not said: {expected.pattern}; but: {errors or ours[-3:]}")
    result.said = told[0] if told else ""
    if len(errors) > (1 if kind.says else 0):
        result.wrong.append(f"more said than one line: {errors}")
    # A fault that lies in the folder is found by a start, whose own time counts.
    bound_s = BOUND_S + (STALL_S if kind.stalls else 0) + (BOUND_S if kind.plant is None else 0)
    if result.seconds is not None and result.seconds > bound_s:
        result.wrong.append(f"said after {result.seconds:.1f} s, not {bound_s:g}")


def pattern_of(kind: Kind, rank: int) -> str:
    """What must be said, with the rank and the host put in."""
    return kind.says.replace("HOST", re.escape(os.uname().nodename)).replace("RANK", str(rank))


def chosen(names: Sequence[str], kinds: Iterable[Kind]) -> list[Kind]:
    """Those with these names, all without; SystemExit for an unknown one."""
    known = {kind.name: kind for kind in kinds}
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"--kinds {unknown[0]}: no such kind; there are {', '.join(known)}")
    return [known[name] for name in names or known]


def prepare() -> None:
    """Imports all that runs need, once, without a thread: they are forked from here."""
    fork.stay_single_threaded()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = str(HERE)
    fork.warm_up(MODULES)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)


def drill(folder: Path, kinds: Sequence[Kind], count: int, seed: int) -> Iterator[Trial]:
    """``count`` faults, kinds in turn. Folders of trials that passed are deleted."""
    runner = Drill(folder)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        trial = runner.trial(kind, number, seed + number // len(kinds))
        if not trial.wrong:
            shutil.rmtree(folder / f"{number:03d}-{kind.name}")
        yield trial


def described(trial: Trial) -> str:
    """A line for who watches."""
    seconds = "" if trial.seconds is None else f"said after {trial.seconds:.1f} s, "
    where = f"{trial.kind}, rank {trial.rank}, {trial.place}"
    return f"{where}: {seconds}took {trial.took_s:g} s: {'; '.join(trial.wrong) or 'ok'}"


class Parser(argparse.ArgumentParser):
    """Knows the kinds only when it is asked for help: they import what runs must not have."""

    def format_help(self) -> str:
        from faults.kinds import KINDS

        return f"{super().format_help()}\nkinds: {' '.join(kind.name for kind in KINDS)}\n"


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100, help="faults in all (default: 100)")
    parser.add_argument("--kinds", nargs="+", default=[], metavar="NAME", help="only these, of those below")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/fault_drill"), help="what failed trials left stays there"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--report", type=Path, help="write a table of kinds into this Markdown file")
    arguments = parser.parse_args()
    prepare()
    from faults.kinds import KINDS, usable

    kinds = chosen(arguments.kinds, KINDS)
    kinds, left_out = usable(kinds)
    folder = (arguments.out / time.strftime("%Y%m%d-%H%M%S")).resolve()
    folder.mkdir(parents=True)
    began = time.monotonic()
    result: dict[str, Any] = {"seed": arguments.seed, "stall_s": STALL_S, "left_out": left_out}
    trials, loads = list[Trial](), list[float]()
    for trial in drill(folder, kinds, arguments.count, arguments.seed):
        trials.append(trial)
        print(f"{len(trials)}/{arguments.count} {described(trial)}", file=sys.stderr, flush=True)
        loads.append(os.getloadavg()[0])
        result |= {"minutes": round((time.monotonic() - began) / 60, 1), "load": round(statistics.median(loads), 1)}
        result |= {"trials": [asdict(each) for each in trials]}
        (folder / "trials.json").write_text(json.dumps(result, indent=1) + "\n")
    if arguments.report is not None:
        from faults.report import write

        write(arguments.report, kinds, result)
    failed = [trial for trial in trials if trial.wrong]
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        Console().print(table(kinds, trials))
        print(f"{len(trials)} faults of {len({trial.kind for trial in trials})} kinds, {len(failed)} not as they should be, "
              f"{sum(trial.is_hang for trial in trials)} hangs; {folder}")  # fmt: skip
    sys.exit(bool(failed))


def table(kinds: Sequence[Kind], trials: Sequence[Trial]) -> Table:
    """For the terminal."""
    found = Table("kind", "trials", "seconds: median", "largest", "failed")
    for kind in kinds:
        mine = [trial for trial in trials if trial.kind == kind.name]
        seconds = [trial.seconds for trial in mine if trial.seconds is not None]
        numbers = [f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"] if seconds else ["", ""]
        found.add_row(kind.name, str(len(mine)), *numbers, str(sum(bool(trial.wrong) for trial in mine)))
    return found


if __name__ == "__main__":
    main()
