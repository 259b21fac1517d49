"""``megatron-sts doctor``: what this machine has."""

from __future__ import annotations

import argparse

from megatron_sts.commands.arguments import Commands, add_command, add_json


def add(commands: Commands) -> None:
    """The arguments."""
    doctor = add_command(
        commands,
        "doctor",
        run,
        help="show what this machine has and what is missing for what",
        description="Show what this machine has, which kernels will be used, and what is missing for what.",
    )
    add_json(doctor)


def run(args: argparse.Namespace) -> int:
    """Look, and print what was found."""
    from megatron_sts.commands.machine import print_json, print_table
    from megatron_sts.runtime.probe import probe

    machine = probe()
    print_json(machine) if args.json else print_table(machine)
    return 0
