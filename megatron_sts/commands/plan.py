"""``megatron-sts plan``: the pipeline layout of a run and what LDS gains with it. Runs nothing."""

from __future__ import annotations

import argparse
import json

from megatron_sts.commands.arguments import Commands, add_command, add_config, add_json, add_nproc


def add(commands: Commands) -> None:
    """The arguments."""
    plan = add_command(
        commands,
        "plan",
        run,
        help="plan the pipeline layout, and show what layer skipping gains with it",
        description="Plan the pipeline layout of a run for its layer skipping (what parallel.layout=auto chooses), and show "
        "the speed-up of each sampler with its best layout. Runs nothing.",
    )
    add_config(plan)
    add_nproc(plan, "as many as the config needs")
    add_json(plan)


def run(args: argparse.Namespace) -> int:
    """Print the plan as tables or as one JSON object."""
    from megatron_sts.commands.speedups import outline, print_tables
    from megatron_sts.config.load import load
    from megatron_sts.config.resolve import resolve
    from megatron_sts.plan.layout import choose_layout

    facts = outline(resolve(load(args.config, args.overrides), world_size=args.nproc, choose_layout=choose_layout))
    print(json.dumps(facts)) if args.json else print_tables(facts)
    return 0
