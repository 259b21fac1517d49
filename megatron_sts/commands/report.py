"""``megatron-sts report``: what a run came to, or how two compare."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sts.commands.arguments import Commands, add_command, add_folder, add_hardware

if TYPE_CHECKING:
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
    return report(args.run_dirs, args.out, [_planned(folder, args) for folder in args.run_dirs])


def _planned(run_dir: Path, args: argparse.Namespace) -> Planned:
    """What ``plan`` says of the stages of a run, of as many steps as that has."""
    from megatron_sts.commands.seconds import assumptions_from, outline_run
    from megatron_sts.config.load import load
    from megatron_sts.config.resolve import resolve
    from megatron_sts.config.run_folder import config_of
    from megatron_sts.plan.hardware import load_hardware
    from megatron_sts.plan.layout import choose_layout
    from megatron_sts.plan.timing.run import run_time
    from megatron_sts.report.run import read_run

    hardware, assumptions = load_hardware(args.hardware), assumptions_from(args.assume)
    derived = read_run(run_dir).config["resolved"]
    steps = [f"stages.{stage['name']}.steps={stage['num_steps']}" for stage in derived["stages"]]
    config = load(config_of(run_dir), ["stages.*.epochs=null", *steps])
    resolved = resolve(config, world_size=derived["world_size"], choose_layout=choose_layout)
    stages: Planned = outline_run(hardware, run_time(hardware, resolved, assumptions), assumptions)["stages"]
    return stages
