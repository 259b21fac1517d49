"""What to do when sbatch refuses a job: it says why in words only, and always ends with status 1. Words of SLURM 22.05. Must not know torch."""

from __future__ import annotations

import re

NO_ANSWER = re.compile(
    r"Unable to contact slurm|Munge encode failed|authentication error|Socket timed out|Zero Bytes were transmitted"
    r"|configuration source|Unable to process configuration|Connection refused",
    re.I,
)
"""Nobody looked at the job."""
BY_OPTION = (
    (re.compile(r"option '--([A-Za-z-]+)"), "sbatch --help lists its options"),
    (re.compile(r"Invalid --([a-z-]+) specification|unrecognized --([a-z-]+) argument"), "man sbatch says what it takes"),
    (re.compile(r"valid (node) count()"), "man sbatch says what it takes"),
    (re.compile(r"invalid (partition) (?:name )?specified", re.I), "sinfo lists them"),
    (re.compile(r"Invalid (account) or account/partition", re.I), "sacctmgr show associations lists yours"),
    (re.compile(r"Invalid (qos)", re.I), "sacctmgr show qos lists them"),
    (re.compile(r"Requested (time) limit is invalid", re.I), "sinfo shows the limits of partitions"),
    (re.compile(r"Invalid (feature) specification", re.I), "sinfo -o '%N %f' lists the nodes' features"),
    (re.compile(r"Invalid (node name) specified", re.I), "sinfo -N lists the nodes"),
    (re.compile(r"Requested (reservation) is invalid", re.I), "scontrol show reservation lists them"),
    (re.compile(r"Job (dependency) problem", re.I), "give it as afterok:JOB"),
    (re.compile(r"Invalid job (array) specification", re.I), "scontrol show config has the greatest number, MaxArraySize"),
    (re.compile(r"Invalid generic resource \((gres)\)", re.I), "sinfo -o '%N %G' lists what nodes have"),
)  # fmt: skip
NAMES = {"node": "nodes", "feature": "constraint", "node name": "nodelist or --exclude"}
"""Options that SLURM calls otherwise."""


def explain(said: str, what: str, otherwise: str) -> str:
    """On one line: what happened, in sbatch's words, and what to do about it. ``what``, ``otherwise``: both where nothing is known of
    such words."""
    told = " ".join(re.sub(r"^sbatch: (?:error: |fatal: )?|^Try .*$", "", said, flags=re.M).split())
    if NO_ANSWER.search(said):
        return f"SLURM does not answer here ({told}); try again later, or where jobs are submitted from (--dry-run shows the script)"
    for pattern, hint in BY_OPTION:
        if found := pattern.search(said):
            name = next(group for group in found.groups() if group)
            return f"sbatch refused --{NAMES.get(name, name)} ({told}); correct it or leave it out: {hint}"
    return f"{what} ({told}); {otherwise}"
