"""The batch script of a SLURM job: ``job.sbatch`` with the directives and settings of one job. Must not know torch.

``launch/slurm/train.sbatch`` is the same file with settings that it takes from its environment, see ``hand_written``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

TEMPLATE = Path(__file__).with_name("job.sbatch")

HAND_WRITTEN_SETTINGS = r"""
# Trains on many nodes. From the checkout:
#   sbatch --nodes=8 --gpus-per-node=8 launch/slurm/train.sbatch CONFIG [key.path=value ...] [options]
# `megatron-sts launch slurm` writes the same script with everything filled in, and checks the job before it is submitted.
#
#   STS_ROOT         checkout, on a file system that all nodes see   (default: where sbatch was called)
#   STS_PYTHON       Python with megatron-sts in it                  (default: $STS_ROOT/.venv/bin/python)
#   STS_RUN_DIR      where the run is written and resumed from       (default: $STS_ROOT/runs/$SLURM_JOB_NAME-$SLURM_JOB_ID)
#   STS_CONTAINER    image for the pyxis plugin                      (default: none)
#   NPROC_PER_NODE   ranks a node                                    (default: its GPUs, or 1 without)
#   STS_LAUNCHER     torchrun: one task a node; srun: one task a rank, which needs --ntasks-per-node too (default: torchrun)
#   MASTER_PORT      free port on the first node                     (default: follows from the job id)
set -euo pipefail
if [ $# -eq 0 ]; then
  printf 'usage: sbatch [options] %s CONFIG [key.path=value ...]\n' launch/slurm/train.sbatch >&2
  exit 2
fi
cd "${STS_ROOT:-${SLURM_SUBMIT_DIR:-$PWD}}"
container=${STS_CONTAINER:-}
python=${STS_PYTHON:-$PWD/.venv/bin/python}
if [ -z "$container" ] && [ ! -x "$python" ]; then
  printf 'megatron-sts: error: no Python at %s; run launch/local.sh once in the checkout, or set STS_PYTHON\n' "$python" >&2
  exit 2
fi
run_dir=${STS_RUN_DIR:-$PWD/runs/$SLURM_JOB_NAME-$SLURM_JOB_ID}
ranks_per_node=${NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}
launcher=${STS_LAUNCHER:-torchrun}
"""


@dataclass(frozen=True)
class Job:
    """Everything that a job's script says."""

    directives: Sequence[tuple[str, str | None]]
    """Options of sbatch with their values; None: a flag."""
    folder: Path
    """Where it runs, which relative paths of the config are relative to."""
    run_dir: Path
    python: str
    ranks_per_node: int
    launcher: str
    """``torchrun``: a task a node. ``srun``: a task a rank."""
    arguments: Sequence[str]
    """Of ``megatron-sts train``, without ``--run-dir``."""
    container: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Exported first."""


def render(job: Job) -> str:
    """The script."""
    settings = ["# Written by `megatron-sts launch slurm`.", "set -euo pipefail", f"cd {quote(str(job.folder))}"]
    settings += [f"export {name}={quote(value)}" for name, value in job.environment.items()]
    settings += [
        f"{name}={quote(str(value))}"
        for name, value in (
            ("container", job.container),
            ("python", job.python),
            ("run_dir", job.run_dir),
            ("ranks_per_node", job.ranks_per_node),
            ("launcher", job.launcher),
        )
    ]
    settings.append(" ".join(["set --", *map(quote, job.arguments)]))
    return _fill(job.directives, "\n".join(settings))


def hand_written() -> str:
    """The text of ``launch/slurm/train.sbatch``."""
    directives = [("job-name", "megatron-sts"), ("nodes", "1"), ("ntasks-per-node", "1"), ("output", "%x-%j.out")]
    return _fill([*directives, *lasting()], HAND_WRITTEN_SETTINGS.strip())


def lasting() -> list[tuple[str, str | None]]:
    """Directives with which a job outlives its time limit and its nodes."""
    return [("open-mode", "append"), ("requeue", None), ("signal", "B:USR1@180")]


def quote(text: str) -> str:
    """``text`` as one word of bash that nothing in it can leave: also newlines, carriage returns and bytes beyond ASCII.

    sbatch refuses scripts with the line ends of DOS, and reads lines that begin with ``#SBATCH``: no word spans lines.
    """
    if text and all(character.isascii() and (character.isalnum() or character in "_-./=:,@%+") for character in text):
        return text
    if text.isascii() and text.isprintable():
        return "'" + text.replace("'", "'\\''") + "'"
    return "$'" + "".join(map(_escaped, text.encode("utf-8", "surrogateescape"))) + "'"


def _escaped(byte: int) -> str:
    character = chr(byte)
    if character in "'\\":
        return "\\" + character
    return character if 32 <= byte < 127 else f"\\{byte:03o}"


def directive(name: str, value: str | None) -> str:
    """A line that sbatch reads; it knows double quotes and backslashes, and # as a comment."""
    if value is None:
        return f"#SBATCH --{name}"
    if not all(character.isalnum() or character in "_-./:,@%+=()[]" for character in value):
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH --{name}={value}"


def _fill(directives: Sequence[tuple[str, str | None]], settings: str) -> str:
    lines = "\n".join(directive(name, value) for name, value in directives)
    return TEMPLATE.read_text(encoding="utf-8").replace("@DIRECTIVES@", lines, 1).replace("@SETTINGS@", settings, 1)
