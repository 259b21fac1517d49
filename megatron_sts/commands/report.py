"""``megatron-sts report``: what a run came to, or how two compare."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_sts.commands.arguments import Commands, add_command, add_folder


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


def run(args: argparse.Namespace) -> int:
    """Write pages and pictures."""
    from megatron_sts.report.write import report

    return report(args.run_dirs, args.out)
