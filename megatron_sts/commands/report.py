"""``megatron-sts report``: what a run came to, or how two compare."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sts.commands.arguments import Commands, add_command, add_folder, add_hardware

if TYPE_CHECKING:
    from megatron_sts.plan.timing.example_step import ExampleStep
    from megatron_sts.report.planned import Planned


def add(commands: Commands) -> None:
    """The arguments."""
    report = add_command(
        commands,
        "report",
        run,
        help="write what a run came to, or compare two runs",
        description="Write report.html into each run's folder. Two folders, dense then STS, are also compared: "
        "comparison.json, comparison.md and comparison.png.",
    )
    report.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help="folder that train wrote")
    add_folder(report, "--out", "where to compare (default: the folder above both)")
    add_hardware(report, "show beside what was measured what plan predicts there")


def run(args: argparse.Namespace) -> int:
    """Write pages and pictures."""
    from megatron_sts.report.write import report

    if args.hardware is None:
        return report(args.run_dirs, args.out)
    plans = [_planned(folder, args) for folder in args.run_dirs]
    status = report(args.run_dirs, args.out, [time for time, _ in plans])
    for folder, (_, steps) in zip(args.run_dirs, plans, strict=True):
        _join_traces(folder, steps)
    return status


def _planned(run_dir: Path, args: argparse.Namespace) -> tuple[Planned, list[ExampleStep]]:
    """What ``plan`` says of the stages of a run, of as many steps as that has, and of the middle step of each."""
    from megatron_sts.commands.seconds import assumptions_from, outline_run
    from megatron_sts.config.load import load
    from megatron_sts.config.resolve import resolve
    from megatron_sts.config.run_folder import config_of
    from megatron_sts.plan.hardware import load_hardware
    from megatron_sts.plan.layout import choose_layout
    from megatron_sts.plan.timing.example_step import example_step
    from megatron_sts.plan.timing.run import run_time
    from megatron_sts.report.run import read_run

    hardware, assumptions = load_hardware(args.hardware), assumptions_from(args.assume)
    derived = read_run(run_dir).config["resolved"]
    steps = [f"stages.{stage['name']}.steps={stage['num_steps']}" for stage in derived["stages"]]
    config = load(config_of(run_dir), ["stages.*.epochs=null", *steps])
    resolved = resolve(config, world_size=derived["world_size"], choose_layout=choose_layout)
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
