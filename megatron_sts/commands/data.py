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
    data = add_group(commands, "data", help="prepare datasets", description="Prepare datasets.")
    prepare = add_command(
        data,
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
    _add_num_workers(prepare)
    prepare.add_argument(
        "--part",
        type=_part,
        metavar="K/N",
        help="only the K-th of N parts, from 1 on, as for a job array; then: data merge",
    )
    merge = add_command(
        data,
        "merge",
        run_merge,
        help="finish a dataset whose parts are prepared",
        description="Write the index of a dataset once all of its parts are prepared (data prepare --part). It is byte for byte that "
        "of a dataset prepared in one go, but for the order of rows in Energon's index.sqlite.",
    )
    add_folder(merge, "--out", "the dataset's folder", required=True)
    _add_num_workers(merge)


def _add_num_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num-workers", type=positive, metavar="N", help="worker processes (default: one a CPU core)")


def _part(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if not slash or not number.isdecimal() or not count.isdecimal() or not 1 <= int(number) <= int(count):
        raise argparse.ArgumentTypeError(f"{text!r} is not K/N with K from 1 to N")
    return int(number), int(count)


def run_merge(args: argparse.Namespace) -> int:
    """Finish and print the summary; 1 if no sample is left."""
    from megatron_sts.data.prepare import merge

    return tell(merge(args.out, args.num_workers or os.cpu_count() or 1), args.out, args.out)


def run_prepare(args: argparse.Namespace) -> int:
    """Prepare and print the summary; 1 if no sample is left."""
    from megatron_sts.data.prepare import Part, prepare

    part = Part(*(args.part or (1, 1)))
    num_workers = args.num_workers or os.cpu_count() or 1
    try:
        images = args.images or args.source.parent
        summary = prepare(args.source, images, args.out, args.shard_size_mb, num_workers, part)
    except KeyboardInterrupt:
        return say_interrupted(args.out)
    if part.count > 1:
        print(
            f"part {part.number} of {part.count}: {summary.num_samples} samples in {summary.num_shards} shards, "
            f"{summary.rejected.total()} entries rejected; when all parts are done: megatron-sts data merge --out {args.out}"
        )
        return 0
    return tell(summary, args.source, args.out)


def tell(summary: Summary, source: Path, out: Path) -> int:
    """Print what came of a source; the exit status."""
    from rich.console import Console
    from rich.table import Table

    from megatron_sts.config.schema import DataConfig
    from megatron_sts.data.prepare import REJECTED_NAME
    from megatron_sts.data.records import Reason

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
    num_entries = num_rejected + summary.num_samples
    if num_rejected > DataConfig().max_bad_fraction * num_entries:  # with which training would stop
        lost = summary.rejected[Reason.MISSING]
        where = f"; {lost} name pictures that are not below the folder that --images gives (default: where the JSON is)"
        print(
            f"megatron-sts: warning: {num_rejected} of {num_entries} entries were rejected{where if lost else ''}",
            file=sys.stderr,
        )
    print(f"{summary.num_samples} samples in {summary.num_shards} shards: {out}")
    return 0
