"""``megatron-sts train``: config first, then a dry run, local ranks or this rank. Must not know how a step works."""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sts.commands.arguments import Commands, add_command, add_config, add_folder, add_json, add_nproc
from megatron_sts.config.errors import ConfigError
from megatron_sts.launch import failure, fork, outcome

if TYPE_CHECKING:
    from megatron_sts.config.resolve import Resolved
    from megatron_sts.launch.environment import Rank


def add(commands: Commands) -> None:
    """The arguments."""
    train = add_command(
        commands,
        "train",
        run,
        help="train a model, on local ranks or as a rank of torchrun/srun",
        description="Train a model. Under torchrun or srun this process is one rank; otherwise it starts local ranks. "
        "Resumes from RUN_DIR if that holds a checkpoint.",
    )
    add_config(train)
    add_nproc(train, "as many as the config needs")
    add_folder(train, "--run-dir", "where the run is written (default: runs/NAME)")
    train.add_argument(
        "--extend",
        action="store_true",
        help="go on with a larger stages.NAME.steps or epochs than the run in RUN_DIR has: learning rate, layer skipping and "
        "token compression are planned anew for it, from the next step on",
    )
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check the config and print what it comes to; run nothing. Exit status 0 if it is sound, though this machine may lack "
        "files or devices that another has; 2 if it could start nowhere",
    )
    add_json(train, "with --dry-run: ")


def run(args: argparse.Namespace) -> int:
    """Check the whole config before anything is started, then do what was asked."""
    if args.json and not args.dry_run:
        raise ConfigError("--json: goes with --dry-run only")
    fork.stay_single_threaded()
    fork.hold_stop_request()
    from megatron_sts.config.load import load
    from megatron_sts.launch import rank_log
    from megatron_sts.launch.environment import join, rank_from
    from megatron_sts.plan.resolved import resolve_planned

    rank = None if args.dry_run else rank_from(os.environ)
    if rank is not None:
        rank_log.keep(rank.rank)
    world_size = args.nproc if rank is None else rank.world_size
    run_dir = args.run_dir or default_run_dir(args.config)
    try:
        resolved = resolve_planned(load(args.config, args.overrides), world_size=world_size)
        if args.dry_run:
            return _print_summary(resolved, run_dir, extend=args.extend, as_json=args.json)
        return start(resolved, run_dir, rank, extend=args.extend)
    except ConfigError as error:
        if rank is None:
            raise
        join(rank, os.environ)
        return failure.report(error, run_dir)  # its launcher may print another line, and turn the status into another


def start(resolved: Resolved, run_dir: Path, rank: Rank | None, *, extend: bool) -> int:
    """Trains as ``rank``, or on local ranks, unless nothing is left to do."""
    from megatron_sts.commands.obstacles import obstacles, unreadable_data
    from megatron_sts.train import resume

    # First, because other data give an epoch another number of steps. Where ranks will train, rank 0 does it for all of them.
    if rank is None or resume.is_over(run_dir):
        resume.check_same_content(resolved, run_dir)
    resume.check_same_run(resolved, run_dir, extend=extend)
    if resume.is_finished(resolved, run_dir):
        if (told := outcome.read(run_dir)) is None or told.outcome != "done":
            outcome.write(run_dir, "done")
        if rank is None or rank.rank == 0:
            print(f"megatron-sts: the run in {run_dir} is finished; nothing is left to do")
        return 0
    with fork.uncollected():  # torch, transformers and Energon may be imported now
        unreadable = unreadable_data(resolved) if rank is None or rank.rank == 0 else ()
        for obstacle in (*obstacles(resolved, is_going_on=resume.is_begun(run_dir)), *unreadable):
            raise ConfigError(obstacle.problem)
    if rank is not None:
        from megatron_sts.launch.rank import become

        return become(rank, partial(train_here, resolved, run_dir), run_dir)
    from megatron_sts.launch.exclusive import sole_writer
    from megatron_sts.launch.local import launch_local

    with sole_writer(run_dir):
        resume.check_same_run(resolved, run_dir, extend=extend)  # again: until now another run may have written it
        outcome.clear(run_dir)
        return launch_local(partial(train_here, resolved, run_dir), resolved.world_size, _modules(resolved), run_dir)


def default_run_dir(config: Path) -> Path:
    """``runs/NAME``: a config.yaml is named by its folder, any other file by itself."""
    from megatron_sts.config.load import CONFIG_NAME

    folder = config if config.is_dir() else config.parent
    is_named_by_folder = config.is_dir() or config.name == CONFIG_NAME
    return Path("runs") / (folder.resolve().name if is_named_by_folder else config.stem)


def train_here(resolved: Resolved, run_dir: Path) -> None:
    """What a rank does."""
    from megatron_sts.train.interrupt import StopRequest

    stop = StopRequest()  # before the import below: the signal may come during it
    with fork.uncollected():
        from megatron_sts.train.loop import run

    run(resolved, run_dir, stop)


def _modules(resolved: Resolved) -> list[str]:
    """What every rank imports before its first step."""
    modules = ["megatron_sts.train.loop", "torch._dynamo"]  # torch.optim asks for the latter when it is first used
    if any(stage.data.source == "energon" for stage in resolved.stages):
        modules.append("megatron_sts.data.energon")
    return modules


def _print_summary(resolved: Resolved, run_dir: Path, *, extend: bool, as_json: bool) -> int:
    from megatron_sts.commands.summary import outline, print_json, print_table

    facts = outline(resolved, run_dir, extend=extend)
    print_json(facts, sys.stdout) if as_json else print_table(facts)
    for obstacle in facts["obstacles"]:
        if not obstacle["of_this_machine"]:
            raise ConfigError(obstacle["problem"])
    return 0
