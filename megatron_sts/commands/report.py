"""``megatron-sts report``: what a run came to, or how several compare."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sts.commands.arguments import Commands, add_command, add_folder, add_hardware, positive
from megatron_sts.config.errors import refuse

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from megatron_sts.plan.timing.example_step import ExampleStep
    from megatron_sts.report.planned import Planned
    from megatron_sts.report.run import Run


def add(commands: Commands) -> None:
    """The arguments."""
    report = add_command(
        commands,
        "report",
        run,
        help="write what a run came to, or several beside each other",
        description="Write report.html into each run's folder. Of several runs, or with --out, also write overview.html, overview.csv "
        "and pictures: loss, gradient norms, accuracy against FLOPs, which layers ran when; runs that differ in their seed alone "
        "count as one. Two folders of other configs, dense then STS, are also compared: comparison.json, comparison.md and comparison.png.",
    )
    report.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help="folder that train wrote")
    add_folder(report, "--out", "where overview and comparison go (default: the folder above all runs)")
    report.add_argument(
        "--kept",
        type=positive,
        metavar="N",
        help="draw which visual tokens every VTC sampler keeps of N embedded scenes, by the eyes of the last run's model",
    )
    report.add_argument(
        "--why", action="store_true", help="print where each stage's seconds went, what loses most, and what to try"
    )
    add_hardware(report, "show beside what was measured what plan predicts there")


def run(args: argparse.Namespace) -> int:
    """Write pages and pictures."""
    from megatron_sts.report.run import read_run
    from megatron_sts.report.write import above, report

    folders = [folder.resolve() for folder in args.run_dirs]
    if twice := next(
        (given for given, own in zip(args.run_dirs, folders, strict=True) if folders.count(own) > 1), None
    ):
        refuse("RUN_DIR", twice, "is given twice", "give each run once")
    runs = [read_run(folder) for folder in args.run_dirs]
    plans = [_planned(each, args) for each in runs] if args.hardware else None
    kept = _kept(runs[-1], args.kept)  # refused before anything is written
    status = report(runs, args.out, None if plans is None else [time for time, _ in plans])
    if args.why:
        from megatron_sts.commands.why import print_why

        for place, each in enumerate(runs):
            print_why(each, None if plans is None else plans[place][0])
    for each, (_, steps) in zip(runs, plans or (), strict=False):
        _join_traces(each.folder, steps)
    if len(runs) > 1 or args.out or kept:
        from megatron_sts.commands.expected import expected_of
        from megatron_sts.report.several import write_overview

        print(write_overview(runs, [expected_of(each) for each in runs], args.out or above(runs), kept))
    return status


def _kept(run: Run, num_images: int | None) -> dict[str, Figure]:
    """The picture that ``--kept`` asks for, by its title."""
    if num_images is None:
        return {}
    from megatron_sts.launch import fork

    fork.stay_single_threaded()
    with fork.uncollected():
        from megatron_sts.commands.kept import draw_kept
    return {"Kept visual tokens": draw_kept(run, num_images)}


def _planned(run: Run, args: argparse.Namespace) -> tuple[Planned, list[ExampleStep]]:
    """What ``plan`` says of the stages of a run, of as many steps as that has, and of the middle step of each."""
    from megatron_sts.commands.seconds import assumptions_from, outline_run
    from megatron_sts.config.load import load
    from megatron_sts.config.run_folder import config_of
    from megatron_sts.plan.hardware import load_hardware
    from megatron_sts.plan.resolved import resolve_planned
    from megatron_sts.plan.timing.example_step import example_step
    from megatron_sts.plan.timing.run import run_time

    hardware, assumptions = load_hardware(args.hardware), assumptions_from(args.assume)
    derived = run.config["resolved"]
    steps = [f"stages.{stage['name']}.steps={stage['num_steps']}" for stage in derived["stages"]]
    config = load(
        config_of(run.folder), ["stages.*.epochs=null", "stages.*.validation=null", "checkpoint.keep_best=0", *steps]
    )
    resolved = resolve_planned(config, world_size=derived["world_size"])
    outlined = outline_run(hardware, run_time(hardware, resolved, assumptions), assumptions)
    return outlined, [example_step(hardware, resolved, stage, assumptions) for stage in resolved.stages]


def _join_traces(run_dir: Path, planned: list[ExampleStep]) -> None:
    """What the ranks of a run did beside what they were to do, in one view."""
    from megatron_sts.plan.trace import write_trace
    from megatron_sts.report.trace import TRACES, join_traces

    measured = sorted((run_dir / TRACES).glob("*.json"))
    if measured:
        with tempfile.TemporaryDirectory() as folder:
            write_trace(Path(folder) / "planned.json", planned)
            join_traces([*measured, Path(folder) / "planned.json"], run_dir / "trace.json")
        print(run_dir / "trace.json")
