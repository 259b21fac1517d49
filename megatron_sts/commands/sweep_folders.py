"""What stands in the way of a sweep's runs in their folders, and on this machine. Trains nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_sts.commands.obstacles import Obstacle, obstacles, other_run, unreadable_data
from megatron_sts.config.errors import ConfigError, OtherRunError
from megatron_sts.config.resolve import Resolved
from megatron_sts.config.sweep import SweepRun
from megatron_sts.launch import lease
from megatron_sts.train import resume

AS_A_SWEEP = {"another --run-dir": "another --out", "add --extend": "use `train --extend`"}
"""Remedies of ``train``, and what a sweep has instead."""


def other_configs(runs: Sequence[SweepRun], resolved: Sequence[Resolved], out: Path) -> dict[str, str]:
    """Names of runs whose folder holds one of another config, and how ``train`` says so. All of the sweep: their table has all."""
    found = {run.name: other_config(of_run, out / run.name) for run, of_run in zip(runs, resolved, strict=True)}
    return {name: problem for name, problem in found.items() if problem is not None}


def other_config(resolved: Resolved, folder: Path) -> str | None:
    """How ``train`` would say that ``folder`` holds a run of another config; None if it does not, or if that cannot be told."""
    if lease.may_be_held(folder):  # by another part of the sweep, which was asked and writes what would be read
        return None
    try:
        if resume.is_begun(folder) or resume.is_over(folder):
            resume.check_same_run(resolved, folder)  # data files are left to the run: all of them would take long
    except OtherRunError as error:
        said = str(error)
        for words, instead in AS_A_SWEEP.items():
            said = said.replace(words, instead)
        return said
    except (ConfigError, OSError):  # files are damaged, or go while they are read: of that run alone, which says so
        return None
    return None


def hindrances(resolved: Resolved, folder: Path) -> Iterator[Obstacle]:
    """What ``train --dry-run`` says that keeps a run from going on; of one that is finished, from being taken for this one."""
    if lease.may_be_held(folder):
        holder = lease.read(folder)
        name = "it has just ended" if holder is None else holder.name
        yield Obstacle(f"another start is writing {folder} ({name}); wait for it, or end it", of_this_machine=True)
        return
    try:
        if not resume.is_finished(resolved, folder):
            yield from obstacles(resolved, is_going_on=resume.is_begun(folder) or resume.is_over(folder))
            yield from unreadable_data(resolved)
        yield from other_run(resolved, folder, extend=False)
    except (ConfigError, OSError) as error:  # files of the folder are damaged, or go while they are read
        yield Obstacle(str(error), of_this_machine=True)


def unasked(resolved: Resolved, folder: Path) -> bool:
    """Whether what is trained there was asked other questions than ``resolved`` has, or none; not if that cannot be told."""
    try:
        return not resume.is_answered(resolved, folder)
    except (ConfigError, OSError):  # a damaged file, of which its row tells
        return False


def stays_done(resolved: Resolved, folder: Path) -> bool:
    """Whether a finished run stays so though a start failed: it is this one, on these data, as far as can be told, with its answers.

    Also where its files are damaged and no checkpoint is left: that it is done is what keeps it from being trained over."""
    if is_of_another(resolved, folder):
        return False
    try:
        return resume.is_finished(resolved, folder)
    except (ConfigError, OSError):
        return not resume.is_begun(folder)


def is_of_another(resolved: Resolved, folder: Path) -> bool:
    """Whether ``folder`` holds what was trained with another config or on other data; not if that cannot be told."""
    try:
        resume.check_same_content(resolved, folder)
        resume.check_same_run(resolved, folder)
    except OtherRunError:
        return True
    except (ConfigError, OSError):  # as where the data are not at hand
        return False
    return False


def refuse_of_sweep(problems: Mapping[str, str]) -> None:
    """Refuses a sweep for what keeps runs of it, by their names, from starting anywhere.

    Raises:
        ConfigError: naming the first one.
    """
    for name, problem in problems.items():
        more = f" (and {len(problems) - 1} more of its runs)" if len(problems) > 1 else ""
        raise ConfigError(f"run {name} of the sweep{more}: {problem}")
