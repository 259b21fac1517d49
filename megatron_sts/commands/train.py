"""``megatron-sts train``: config first, then a dry run, local ranks or this rank. Must not know how a step works."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_sts.commands.obstacles import obstacles
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import CONFIG_NAME, load
from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.launch import environment, failure
from megatron_sts.launch.exclusive import sole_writer
from megatron_sts.plan.layout import choose_layout
from megatron_sts.runtime.probe import check_usable
from megatron_sts.train import resume


def train(
    config: Path,
    overrides: Sequence[str],
    run_dir: Path | None,
    nproc: int | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Check the whole config before anything is started, then do what was asked. Returns the exit status."""
    rank = None if dry_run else environment.rank_from(os.environ)
    world_size = nproc if rank is None else rank.world_size
    resolved = resolve(load(config, overrides), world_size=world_size, choose_layout=choose_layout)
    run_dir = run_dir or default_run_dir(config)
    if dry_run:
        return _print_summary(resolved, as_json=as_json)
    resume.check_same_run(resolved, run_dir)
    if resume.is_finished(resolved, run_dir):
        if rank is None or rank.rank == 0:
            print(f"megatron-sts: the run in {run_dir} is finished; nothing is left to do")
        return 0
    if rank is None:
        check_usable(resolved.config)
    for line in obstacles(resolved):
        raise ConfigError(line)
    if rank is not None:
        environment.join(rank, os.environ)
        status = run_rank(resolved, run_dir)
        return failure.leave(status) if status else 0
    from megatron_sts.launch.local import launch_local

    with sole_writer(run_dir):
        resume.check_same_run(resolved, run_dir)  # again: until now another run may have written it
        return launch_local(["train", str(config), *overrides, "--run-dir", str(run_dir)], resolved.world_size)


def default_run_dir(config: Path) -> Path:
    """``runs/NAME``: a config.yaml is named by its folder, any other file by itself."""
    folder = config if config.is_dir() else config.parent
    is_named_by_folder = config.is_dir() or config.name == CONFIG_NAME
    return Path("runs") / (folder.resolve().name if is_named_by_folder else config.stem)


def run_rank(resolved: Resolved, run_dir: Path) -> int:
    """This process is one rank: train, and leave what went wrong where the launcher finds it."""
    from megatron_sts.launch.local import follow_launcher
    from megatron_sts.train.interrupt import StopRequest

    stop = StopRequest()  # before the imports below: the signal may come during them
    follow_launcher()
    try:
        from megatron_sts.train.loop import run

        run(resolved, run_dir, stop)
    except Exception as error:
        return failure.report(error)
    return 0


def _print_summary(resolved: Resolved, *, as_json: bool) -> int:
    from megatron_sts.commands.summary import outline, print_json, print_table

    facts = outline(resolved)
    print_json(facts, sys.stdout) if as_json else print_table(facts)
    return 0
