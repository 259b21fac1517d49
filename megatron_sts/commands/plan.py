"""``megatron-sts plan``: the pipeline layout of a run, what LDS gains with it, its memory, and what it takes on given hardware. Runs nothing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_sts.commands.arguments import Commands, add_command, add_config, add_hardware, add_json, add_nproc


def add(commands: Commands) -> None:
    """The arguments."""
    plan = add_command(
        commands,
        "plan",
        run,
        help="plan the pipeline layout, show what layer skipping gains with it, and what a run takes",
        description="Plan the pipeline layout of a run for its layer skipping (what parallel.layout=auto chooses), and show "
        "the speed-up of each sampler with its best layout; each rank's memory at its peak and what it exchanges in a step; and seconds "
        "a step, throughput and GPU-hours on given hardware, dense beside sparse. Runs nothing. Exit status 0 also for a run that does not fit the memory, which is said: dryrun judges.",
    )
    add_config(plan)
    add_nproc(plan, "as many as the config needs")
    add_json(plan)
    add_hardware(plan, "how long it takes there", " (default: h100, for runs of whose number format it has rates)")
    plan.add_argument(
        "--search",
        action="store_true",
        help="also look for the fastest tensor- and pipeline-parallel sizes, chunks, layout, micro-batches and recomputation that "
        "fit the memory, on as many GPUs",
    )
    plan.add_argument(
        "--trace",
        metavar="FILE",
        type=Path,
        help="write each stage's middle step as a trace (Perfetto, chrome://tracing)",
    )
    plan.add_argument("--timeline", metavar="PNG", type=Path, help="draw the same steps")


def run(args: argparse.Namespace) -> int:
    """Print the plan as tables or as one JSON object."""
    from rich.console import Console

    from megatron_sts.commands.bytes import fits, outline_bytes, print_bytes
    from megatron_sts.commands.seconds import (
        assumptions_from,
        outline_seconds,
        print_seconds,
        why_untimed,
        write_timelines,
    )
    from megatron_sts.commands.speedups import outline, print_tables
    from megatron_sts.commands.ways import outline_search, print_search
    from megatron_sts.config.load import load
    from megatron_sts.plan.hardware import load_hardware
    from megatron_sts.plan.resolved import resolve_planned

    assumptions = assumptions_from(args.assume)
    hardware = load_hardware(args.hardware or "h100")
    resolved = resolve_planned(load(args.config, args.overrides), world_size=args.nproc)
    is_asked = any((args.hardware, args.search, args.trace, args.timeline))
    untimed = None if is_asked else why_untimed(hardware, resolved)
    if args.trace or args.timeline:
        write_timelines(hardware, resolved, assumptions, args.trace, args.timeline)
    facts = outline(resolved)
    facts["time"] = outline_seconds(hardware, resolved, assumptions, facts["lds"]) if untimed is None else None
    facts["memory"] = outline_bytes(resolved, hardware.device.memory_gib if untimed is None else None)
    if args.search:
        facts["search"] = outline_search(hardware, resolved, assumptions)
    if args.json:
        print(json.dumps(facts))
        return 0
    print_tables(facts)
    print_bytes(facts["memory"], Console())
    if facts["time"] is not None:
        print_seconds(facts["time"], Console())
    else:
        Console().print(f"No seconds and no head-room: {untimed}.", highlight=False)
    if args.search:
        print_search(facts["search"], facts["time"]["hours"], Console(), fits=fits(facts["memory"]))
    return 0
