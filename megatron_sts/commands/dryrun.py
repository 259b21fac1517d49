"""``megatron-sts dryrun``: ranks of a run that is not there, one training step each. Must not know how a step works."""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from megatron_sts.commands.arguments import Commands, add_command, add_config, add_json
from megatron_sts.config.errors import ConfigError, refuse

if TYPE_CHECKING:
    from megatron_sts.config.precision import PrecisionConfig
    from megatron_sts.config.resolve import Resolved
    from megatron_sts.dry.account import Account


def add(commands: Commands) -> None:
    """The arguments."""
    dryrun = add_command(
        commands,
        "dryrun",
        run,
        help="run a training step of any rank of any world without its devices, and count what it does",
        description="Run a training step of any rank of the config's world: the real code, on tensors without memory and with "
        "nobody to talk to. Counts FLOPs, bytes of memory and of communication, and says in one line what would fail. Exit status 0 if "
        "the step runs and fits, 1 if it would fail or needs more memory than --hardware or --memory-gib has, 2 if the config is refused.",
    )
    add_config(dryrun)
    ranks = dryrun.add_mutually_exclusive_group()
    ranks.add_argument("--rank", type=int, default=0, metavar="R", help="which rank (default: 0)")
    ranks.add_argument("--stages", action="store_true", help="the first rank of each pipeline stage")
    dryrun.add_argument("--stage", metavar="NAME", help="which training stage (default: the last)")
    dryrun.add_argument(
        "--step", type=int, metavar="N", help="which of its steps, from 0 (default: the last of its longest)"
    )
    dryrun.add_argument(
        "--all", action="store_true", help="run every micro-batch, instead of a few from which the others follow"
    )
    dryrun.add_argument(
        "--kernels",
        choices=("torch", "engine"),
        default="torch",
        help="whose decoder layers are counted: torch's, which are run, or Transformer Engine's (with FP8), by a table of what they "
        "keep and send (default: torch)",
    )
    memory = dryrun.add_mutually_exclusive_group()
    memory.add_argument("--memory-gib", type=float, metavar="GIB", help="what a rank may use: say if it needs more")
    memory.add_argument(
        "--hardware",
        metavar="NAME",
        help="say if a rank needs more memory than h100, h200, a100, or a YAML file of the same form has",
    )
    add_json(dryrun)


def run(args: argparse.Namespace) -> int:
    """Print tables, or one JSON object; 1 if a rank would fail or needs more memory than there is."""
    from megatron_sts.config.load import load
    from megatron_sts.plan.resolved import resolve_planned

    resolved = resolve_planned(load(args.config, args.overrides))
    stage = resolved.stages[-1] if args.stage is None else resolved.stage(args.stage)
    if args.step is not None and not 0 <= args.step < stage.num_steps:
        refuse("--step", args.step, f"stage {stage.name} has {stage.num_steps} steps", "count from 0")
    if not 0 <= args.rank < resolved.world_size:
        refuse("--rank", args.rank, f"the run has {resolved.world_size} ranks", "count from 0")
    if args.memory_gib is not None and args.memory_gib <= 0:
        refuse("--memory-gib", args.memory_gib, "no device has that", "give what one has")
    memory_gib = args.memory_gib
    if args.hardware is not None:
        memory_gib = _usable_gib(args.hardware, resolved.config.precision)
    accounts, problems = _accounts(resolved, stage.name, args, memory_gib)
    if args.json:
        found = {"stage": stage.name, "ranks": [account.as_json() for account in accounts], "problems": problems}
        print(json.dumps(found))
    else:
        from megatron_sts.commands.accounts import print_accounts

        print_accounts(accounts)
    for problem in problems:
        print(f"megatron-sts: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _usable_gib(name: str, precision: PrecisionConfig) -> float:
    """Of a device's memory, what its context leaves; refuses formats that it does not have, as ``plan`` does."""
    from megatron_sts.cost.peak import CONTEXT_BYTES
    from megatron_sts.plan.hardware import check_formats, load_hardware

    hardware = load_hardware(name)
    check_formats(hardware, precision)
    return hardware.device.memory_gib - CONTEXT_BYTES / 2**30


def _accounts(
    resolved: Resolved, stage: str, args: argparse.Namespace, memory_gib: float | None
) -> tuple[list[Account], list[str]]:
    """Of each rank asked for, and what is wrong with them."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: a dry run is the same with and without
    from megatron_sts.dry import run as dry
    from megatron_sts.dry.verdict import DryRunError, too_large

    pp = resolved.config.parallel.pipeline_model_parallel_size
    ranks = [dry.rank_of_stage(resolved, pp_rank) for pp_rank in range(pp)] if args.stages else [args.rank]
    accounts: list[Account] = []
    problems: list[str] = []
    for rank in ranks:
        try:
            account = dry.run(resolved, rank, stage, step=args.step, run_all=args.all, kernels=args.kernels)
            accounts.append(account)
        except ConfigError:
            raise
        except DryRunError as error:
            problems.append(str(error))
        else:
            problems += too_large(account, memory_gib)
    return accounts, problems
