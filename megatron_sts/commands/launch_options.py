"""Options of ``launch slurm``: those that sbatch has too, and what is refused before the config is looked at."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path

from megatron_sts.config.errors import refuse

ARRAY = "{array}"
"""Stands for a job array's number."""
PASSED_ON = {
    "partition": "where to run",
    "account": "who pays",
    "qos": "quality of service",
    "time": "limit: D-HH:MM:SS; the run saves three minutes before it and goes back into the queue",
    "constraint": "features of the nodes",
    "nodelist": "these nodes",
    "exclude": "not these nodes",
    "reservation": "a reservation",
    "mem": "memory a node; 0: all of it",
    "array": f"numbers of a job array: {ARRAY} in --run-dir and in overrides is replaced by them",
    "dependency": "jobs to wait for",
}
"""Options of sbatch that people need often; the others through --sbatch."""
OWN = {
    **{name: f"--{name}" for name in ("nodes", "gpus-per-node", "exclusive", *PASSED_ON)},
    "gpus": "--gpus-per-node",
    "ntasks": "--nodes and --ranks-per-node",
    "ntasks-per-node": "--ranks-per-node",
    "tasks-per-node": "--ranks-per-node",
    "cpus-per-task": "--cpus-per-rank",
    "requeue": "--no-requeue, without which it is requeued",
    "no-requeue": "--no-requeue",
    "output": "--run-dir, below which the log lies",
}
"""Options of sbatch that the script sets from others: through ``--sbatch`` they would get past the checks."""


def check_options(args: argparse.Namespace) -> None:
    """What an option may be, whatever the config.

    Raises:
        ConfigError: naming the option.
    """
    if args.gpus_per_node < 0:
        refuse("--gpus-per-node", args.gpus_per_node, "not a number of GPUs", "give 0 or more")
    if args.gpus_per_node == 0 and args.ranks_per_node is None:
        refuse("--gpus-per-node", 0, "nothing says how many ranks a node has", "add --ranks-per-node")
    if args.gpus_per_node and (args.ranks_per_node or args.gpus_per_node) > args.gpus_per_node:
        refuse(
            "--ranks-per-node", args.ranks_per_node, f"more than a node's {args.gpus_per_node} GPUs", "a rank has a GPU"
        )
    if args.array and args.follow:
        refuse("--follow", "", "an array has a log for each of its numbers", "leave it out")
    for word in args.env:
        name, equals, _ = word.partition("=")
        if not equals or not name.isidentifier():
            refuse("--env", word, "not NAME=VALUE", "name a variable and its value")
    for word in args.sbatch:
        _check_sbatch(word)
    if args.python is not None and not args.container and not args.untested:
        _check_python(args.python)


def _check_sbatch(word: str) -> None:
    """sbatch takes any beginning of a name that only one has."""
    name = word.lstrip("-").partition("=")[0]
    if not re.fullmatch(r"[a-z][a-z-]+", name):
        refuse("--sbatch", word, "not NAME=VALUE with an option's long name", "write for example signal=B:USR1@600")
    meant = name if name in OWN else next((own for own in OWN if own.startswith(name)), None)
    if meant is not None:
        refuse("--sbatch", word, f"the script sets {meant} itself", f"give {OWN[meant]}")


def _check_python(python: str) -> None:
    """A name without a folder is looked up on the nodes."""
    path = Path(python)
    if os.sep in python and not (path.is_file() and os.access(path, os.X_OK)):
        refuse("--python", python, "no program here", "correct it, or, if only the nodes have it, give --untested")


def warn_of_holder(run_dir: Path) -> None:
    """Says so if another start seems to be alive in the run's folder."""
    from megatron_sts.launch import lease

    holder = lease.read(run_dir)
    if holder is not None and lease.may_be_held(run_dir):
        print(
            f"megatron-sts: warning: {run_dir}: a run is writing it ({holder.name}); this job will be refused at its start unless that "
            "one has ended",
            file=sys.stderr,
        )
