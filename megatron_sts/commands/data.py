"""``megatron-sts data prepare``: the arguments, and what came of it."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sts.commands.arguments import Commands, add_command, add_folder, add_group, positive
from megatron_sts.commands.interrupted import say_interrupted

if TYPE_CHECKING:
    from megatron_sts.data.prepare import Summary


def add(commands: Commands) -> None:
    """``data`` and what it holds."""
    prepare = add_command(
        add_group(commands, "data", help="prepare datasets", description="Prepare datasets."),
        "prepare",
        run_prepare,
        help="turn a LLaVA JSON and its pictures into shards for data.source=energon",
        description="Turn a LLaVA JSON and its pictures into WebDataset shards that Energon reads. Entries that cannot be "
        "used are left out and listed in DIR/rejected.jsonl. Pictures are stored as they are; the summary counts those that are "
        "turned upright, laid on white or scaled to 8 bits whenever they are read. Goes on where an interrupted run stopped.",
    )
    prepare.add_argument(
        "source", metavar="JSON", type=Path, help="a list of {id, image, conversations}, or one a line"
    )
    add_folder(prepare, "--images", "folder of the pictures (default: the JSON's)")
    add_folder(prepare, "--out", "where the dataset is written", required=True)
    prepare.add_argument("--shard-size-mb", type=positive, metavar="N", default=256, help="MiB a shard (default: 256)")
    prepare.add_argument("--num-workers", type=positive, metavar="N", help="worker processes (default: one a CPU core)")


def run_prepare(args: argparse.Namespace) -> int:
    """Prepare and print the summary; 1 if no sample is left."""
    from megatron_sts.data.prepare import prepare

    num_workers = args.num_workers or os.cpu_count() or 1
    try:
        summary = prepare(args.source, args.images or args.source.parent, args.out, args.shard_size_mb, num_workers)
    except KeyboardInterrupt:
        return say_interrupted(args.out)
    return tell(summary, args.source, args.out)


def tell(summary: Summary, source: Path, out: Path) -> int:
    """Print what came of a source; the exit status."""
    from rich.console import Console
    from rich.table import Table

    from megatron_sts.data.prepare import REJECTED_NAME

    num_rejected = summary.rejected.total()
    if num_rejected:
        table = Table("entries", "rejected because", title=f"Rejected: {num_rejected}", title_justify="left")
        for reason, count in summary.rejected.most_common():
            table.add_row(str(count), reason)
        Console().print(table)
        print(out / REJECTED_NAME)
    if summary.changes:
        table = Table("pictures", "shown to the model", title="Stored as they are, but", title_justify="left")
        for change, count in summary.changes.most_common():
            table.add_row(str(count), change)
        Console().print(table)
    if summary.num_samples == 0:
        print(f"megatron-sts: error: {source}: none of its {num_rejected} entries can be used", file=sys.stderr)
        return 1
    print(f"{summary.num_samples} samples in {summary.num_shards} shards: {out}")
    return 0
