"""The page about a drill: launch/slurm/reliability.md. Knows nothing of how it was done."""

from __future__ import annotations

import os
import re
import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from faults.kinds import Kind

HEAD = """# Faults, and what becomes of them

Written by `tools/fault_drill.py`, which injects faults into small real runs (two ranks on gloo that our launcher starts, mostly two
pipeline ranks of two chunks each with layers skipped by rounds; {cpus} CPU cores, which others used too: a load of {load}) at moments that a seed decides: {num} faults of
{kinds} kinds in {minutes} minutes, seed {seed}. **{failed} were not handled as they should be, {hangs} hung, and after {left} a process
was left.** Where the fault ended the run, the same command was started again; where it did not, the run went on by itself. Either way every
step's numbers and every weight, moment and random state of the last checkpoint are those of a run that nobody disturbed, to the last
bit, unless the last column says otherwise. Lost are the steps since the last whole checkpoint, and nothing else.

What stalls is noticed after `parallel.timeout_s` ({stall_s:g} s here, 600 s by default); its seconds include that. Seconds are from the
fault to the line that names it; of damage, from the start that finds it; where nobody is left to speak, to the end of the last
process. "Again": steps that were done a second time, at most; checkpoints are three steps apart. Where a killed rank "was last" is
what its last heartbeat said, up to a second before; these runs last two.

Who is named: the rank that died, stopped, failed, differs or does not come. Where a network fails nobody can tell which of them is
wrong: the line says where each of them is. Ranks with the same code and config that disagree all the same (a bug, or broken memory)
are named by what they do: rows of another size before they are sent, at which gloo would abort the process that meets them; a
number of micro-batches by the sum over replicas, or among ranks of one model copy once they have waited in vain. Not injected here: faults of GPUs and NCCL, of shared file systems, and
whole nodes, for which `tests/slurm` has jobs on a real SLURM.
"""
LONGEST = 260
"""Characters of a line that are shown."""
TABLE = """
| fault | trials | what is said | s, median | s, largest | exit status | again |
|---|---|---|---|---|---|---|
"""
THEN = {
    "ends": "goes on without that sample",
    "refused": "does not start: nothing is left to go on from, or to be trusted",
}
FEATURES = """
## Beside nvidia-resiliency-ext

Its own README lists six components; the table of seven rows is the one of NVIDIA's Megatron Bridge, which builds on it
([resiliency](https://docs.nvidia.com/nemo/megatron-bridge/latest/training/resiliency.html)). What there is here:

| feature | here |
|---|---|
| Fault tolerance: hangs are detected, and the job restarts | Hangs: yes, as above, with any launcher and without a monitor process; rank, node, phase and line are named. Restarts: by SLURM's requeue, of the whole job, after USR1, preemption, a dead node, or a rank that did not come or fell silent, then on other nodes if there are some. **No** restart within the allocation, no hot spares; an error of a rank's own is not started again |
| Straggler detection | Each rank's seconds in its passes, waiting for data and in everything else, and the slow rank named (`logging.ranks_interval_steps`); **not seen on GPUs**. No scores of single kernels |
| Preemption: a clean stop before the time limit | Yes: USR1 and TERM, from SLURM or anybody (`launch/slurm/README.md`) |
| Asynchronous checkpoints | Yes (`checkpoint.asynchronous`): a copy on the host, written by a thread of the rank. nvidia-resiliency-ext writes in a process; **not seen on GPUs** here |
| Local checkpoints, on the node and replicated | **No.** Checkpoints are on the file system that all nodes see |
| Re-run state machine: is a NaN or a spike the data's or the machine's? | **No** step is run again to find out. Updates that are not finite are not applied, a row of them ends the run and names the first; a loss that leaps can send the run back, and on without the samples that led there (`guard.spike_factor`); checksums between ranks name one that computes otherwise (`guard.checksum_interval_steps`) |
| In-process restart | **No**; experimental there too |

Of what its README names beside these we have no health checks of GPUs and adapters before a start, and no attribution of faults from logs.
"""


def write(path: Path, kinds: Sequence[Kind], result: dict[str, Any]) -> None:
    """The whole page."""
    trials = result["trials"]
    of_kind = {kind: [trial for trial in trials if trial["kind"] == kind.name] for kind in kinds}
    facts = {
        "num": len(trials),
        "kinds": sum(bool(mine) for mine in of_kind.values()),
        "failed": sum(bool(trial["wrong"]) for trial in trials),
        "hangs": sum(trial["is_hang"] for trial in trials),
        "left": sum("left running" in wrong for trial in trials for wrong in trial["wrong"]),
        "cpus": len(os.sched_getaffinity(0)),
        **{name: result[name] for name in ("minutes", "seed", "stall_s", "load")},
    }
    text = HEAD.format(**facts) + TABLE + "\n".join(row(kind, mine) for kind, mine in of_kind.items() if mine) + "\n"
    if result["left_out"]:
        text += f"\nNot possible on this machine: {', '.join(result['left_out'])}.\n"
    if failed := [trial for trial in trials if trial["wrong"]]:
        text += "\n## Not as it should be\n\n"
        text += "".join(
            f"- {trial['kind']} (seed {trial['seed']}): {plain('; '.join(trial['wrong']))}\n" for trial in failed
        )
    path.write_text(text + FEATURES, encoding="utf-8")


def row(kind: Kind, trials: Sequence[dict[str, Any]]) -> str:
    """One kind."""
    seconds = [trial["seconds"] for trial in trials if trial["seconds"] is not None]
    said = next((trial["said"] for trial in trials if trial["said"]), "")
    times = [f"{statistics.median(seconds):.1f}", f"{max(seconds):.1f}"] if seconds else ["", ""]
    again = [trial["lost_steps"] for trial in trials if trial["lost_steps"] is not None]
    then = THEN.get(kind.then) or (str(max(again)) if again else "none: the run goes on")
    words = plain(said) or (
        "nobody is left to say it" if kind.status < 0 else "nothing: the run goes on as if nothing was"
    )
    return f"| {kind.what} | {len(trials)} | {words} | {' | '.join(times)} | {kind.status} | {then} |"


def plain(said: str) -> str:
    """Without what belongs to this machine."""
    said = said.removeprefix("megatron-sts: ").replace(os.uname().nodename, "NODE")
    said = re.sub(r"pid \d+", "pid PID", re.sub(r"(--run-dir=|data\.path=)\S+?(?=[:/ ]|$)\S*", r"\1DIR:", said))
    return textwrap.shorten(re.sub(r"/\S*/(?=[\w.-]+)", "", said), LONGEST, placeholder=" …").replace("|", "\\|")
