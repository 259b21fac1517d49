"""``megatron-sts sweep``: one config with many settings and seeds, and a table of what they came to."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from megatron_sts.commands.arguments import Commands, add_command, add_folder, add_overrides, positive
from megatron_sts.commands.sweep_runs import Ended, Processes
from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.launch import lease, outcome

if TYPE_CHECKING:
    from megatron_sts.config.resolve import Resolved
    from megatron_sts.config.sweep import SweepRun
    from megatron_sts.report.sweep import Row

SWEEP_NAME = "sweep.yaml"
"""The file that a folder is taken for."""
LOG = "sweep.log"
"""In a run's folder: what its ``train`` printed."""
ERROR = "megatron-sts: error: "
"""Before the line that says why a command ended."""


def add(commands: Commands) -> None:
    """The arguments."""
    sweep = add_command(
        commands,
        "sweep",
        run,
        help="train one config with many settings and seeds",
        description="Train every run of a sweep file (config, overrides, cases, grid, seeds; see megatron_sts/config/README.md) into DIR/NAME, and write "
        "DIR/results.csv and results.jsonl. Runs that are finished are not repeated, others go on from their checkpoints.",
    )
    sweep.add_argument("sweep", metavar="SWEEP", type=Path, help=f"YAML file, or a folder that holds {SWEEP_NAME}")
    add_overrides(sweep, "those of every run")
    add_folder(sweep, "--out", "where runs and tables are written (default: runs/NAME of the file)")
    sweep.add_argument("--jobs", type=positive, metavar="N", default=1, help="runs at a time (default: 1)")
    sweep.add_argument(
        "--part", metavar="K/N", help="only every N-th run, from the K-th (1 to N) on, as for a job array"
    )
    sweep.add_argument(
        "--dry-run",
        action="store_true",
        help="check and list the runs, what would keep them from starting, their FLOPs and about how long they take; train nothing. "
        "The sweep itself is refused only where a folder holds a run of another config",
    )
    sweep.add_argument(
        "--gflops",
        type=positive,
        metavar="N",
        help="--dry-run: billion FLOPs a second of a run (default: as of the runs that are finished in DIR)",
    )


def run(args: argparse.Namespace) -> int:
    """Check every run's config before the first one starts; then train, and write the table after each."""
    from megatron_sts.commands.sweep_folders import other_configs, refuse_of_sweep, unasked
    from megatron_sts.config.sweep import config_of, read, runs_of
    from megatron_sts.report.sweep import update

    file = args.sweep / SWEEP_NAME if args.sweep.is_dir() else args.sweep
    sweep = read(file)
    sweep = sweep.model_copy(update={"overrides": (*sweep.overrides, *args.overrides)})
    config, runs = config_of(sweep, file), runs_of(sweep)
    mine = part_of(runs, args.part)
    resolved = check(config, runs)
    out = args.out or Path("runs") / file.stem
    others = other_configs(runs, resolved, out)
    if args.dry_run:
        of_mine = {each.name: resolved[runs.index(each)] for each in mine}
        for each in mine:
            print(f"{each.name}: {' '.join(each.overrides)}")
        print(f"{len(mine)} of {len(runs)} runs, into {out}: {dry_run(of_mine, others, out, args)}")
        return 0
    refuse_of_sweep(others)
    out.mkdir(parents=True, exist_ok=True)
    of_run = dict(zip((each.name for each in runs), resolved, strict=True))
    tell = partial(update, runs, out, lambda one: unasked(of_run[one.name], out / one.name))
    processes, rows = Processes(), tell()
    with processes.obeying_signals(), ThreadPoolExecutor(args.jobs) as pool:
        begun = [pool.submit(train, config, one, of_run[one.name], out, processes) for one in mine]
        try:
            for ended in as_completed(begun):
                if ended.result() is not None:  # it began
                    rows = tell()
        except BaseException:  # as where the table cannot be written: nobody would know of runs that begin yet
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return told_end(mine, [ended.result() for ended in begun], rows, processes.stopped_by, out / "results.csv")


def dry_run(mine: Mapping[str, Resolved], others: Mapping[str, str], out: Path, args: argparse.Namespace) -> str:
    """Prints what stands in runs' way; what they cost, in words. ``others``: runs whose folders hold another config's.

    Raises:
        ConfigError: a run could start nowhere.
    """
    from megatron_sts.commands.sweep_costs import told
    from megatron_sts.commands.sweep_folders import hindrances, refuse_of_sweep

    nowhere = dict(others)
    for name, problem in others.items():
        print(f"{name}: will not start: {problem}")
    for name, of_run in mine.items():
        for found in hindrances(of_run, out / name) if name not in others else ():
            print(f"{name}: will not start{' on this machine' if found.of_this_machine else ''}: {found.problem}")
            if not found.of_this_machine:
                nowhere.setdefault(name, found.problem)
    refuse_of_sweep(nowhere)
    return told(list(mine.values()), [out / name for name in mine], args.jobs, args.gflops)


def told_end(
    mine: Sequence[SweepRun], ends: Sequence[Ended | None], rows: Sequence[Row], stopped_by: int | None, table: Path
) -> int:
    """Says how a sweep ended, of whose runs None never began and whose table has ``rows``; its exit status."""
    is_cut = any(ended is None or ended.is_stopped for ended in ends)
    found = {row["run"]: row["status"] for row in rows}
    came_to_end = [(one.name, ended.status) for one, ended in zip(mine, ends, strict=True) if ended and not ended.is_stopped]  # fmt: skip
    failed = [name for name, status in came_to_end if status or found[name] == "failed"]
    left = [name for name, _ in came_to_end if name not in failed and found[name] != "done"]
    num_done = sum(found[one.name] == "done" for one in mine)
    say(f"megatron-sts: {table} has {num_done} runs of {len(mine)} that are done")
    if failed:
        say(f"megatron-sts: error: {len(failed)} of {len(mine)} runs failed: {', '.join(failed)}", sys.stderr)
    if left:
        say(f"megatron-sts: error: {len(left)} of {len(mine)} runs ended before they were done: {', '.join(left)}; the same command goes on", sys.stderr)  # fmt: skip
    if is_cut:
        assert stopped_by is not None
        say(f"megatron-sts: stopped by {signal.Signals(stopped_by).name}; the same command goes on", sys.stderr)
        return 128 + stopped_by
    return 1 if failed or left else 0


def say(text: str, file: TextIO | None = None) -> None:
    """Prints; after a hang-up there may be nobody to read it."""
    with suppress(OSError):
        print(text, file=file, flush=True)


def part_of(runs: Sequence[SweepRun], part: str | None) -> Sequence[SweepRun]:
    """Every N-th run."""
    if part is None:
        return runs
    words = part.split("/")
    if len(words) != 2 or not all(word.isdecimal() for word in words) or not 1 <= int(words[0]) <= int(words[1]):
        refuse("--part", part, "not of the form K/N with K from 1 to N", "write for example 1/4")
    return runs[int(words[0]) - 1 :: int(words[1])]


def check(config: Path, runs: Sequence[SweepRun]) -> list[Resolved]:
    """Refuses a sweep of which a run could not start; what each run comes to.

    Raises:
        ConfigError: naming the run.
    """
    from megatron_sts.config.load import load
    from megatron_sts.plan.resolved import resolve_planned

    found = []
    for each in runs:
        try:
            found.append(resolve_planned(load(config, each.overrides)))
        except ConfigError as error:
            raise ConfigError(f"run {each.name} of the sweep: {error}") from None
    return found


def train(config: Path, one: SweepRun, resolved: Resolved, out: Path, processes: Processes) -> Ended | None:
    """Trains one run in a process of its own; None: the sweep was stopped before. What it prints goes into its folder. So does why it
    failed, for the table, where it did before it could say so there itself."""
    from megatron_sts.commands.sweep_folders import stays_done

    folder, log, began = out / one.name, out / one.name / LOG, time.monotonic()
    command = [sys.executable, "-m", "megatron_sts", "train", str(config), *one.overrides, "--run-dir", str(folder)]
    before = outcome.read(folder)
    try:
        log_bytes = log.stat().st_size if log.is_file() else 0
        ended = processes.run(command, log, lambda: say(f"megatron-sts: {one.name}: started, see {log}"))
    except OSError as error:  # of this run's folder or log: others go on
        say(f"megatron-sts: {one.name}: failed: {error}", sys.stderr)
        return Ended(1)
    if ended is None:
        return None
    is_done = (now := outcome.read(folder)) is not None and now.outcome == "done"
    words = "done" if is_done and not ended.status else "stopped"
    if ended.status and not ended.is_stopped:
        words = f"failed (status {ended.status}, see {log})"
        cause = cause_in(log, log_bytes) or f"ended with status {ended.status}, see {log}"
        is_kept = is_done and stays_done(resolved, folder)
        # Not where another start has the folder, nor where the run has said so itself, while its data were read just now too.
        if not is_kept and not lease.may_be_held(folder) and outcome.read(folder) in (None, before):
            outcome.write(folder, "failed", cause)
    say(f"megatron-sts: {one.name}: {words} after {time.monotonic() - began:.0f} s")
    return ended


def cause_in(log: Path, start: int) -> str | None:
    """The last error that a log tells of after its first ``start`` bytes."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.removeprefix(ERROR) for line in reversed(lines) if line.startswith(ERROR)), None)
