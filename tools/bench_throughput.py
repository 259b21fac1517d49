"""A config's steady state: how fast its steps are, where their time goes, and how that scales with nodes.

    python tools/bench_throughput.py run CONFIG [key.path=value ...] [--nproc N] [--steps N] [--out DIR] [--json]
    python tools/bench_throughput.py submit CONFIG [key.path=value ...] --nodes 1 2 4 --scaling weak [--out DIR] [--options OPTION ...]
    python tools/bench_throughput.py read RUN_DIR ... [--json]

``run`` trains every stage of CONFIG for so many steps on local ranks and reads what they wrote. ``submit`` gives the same runs to
SLURM, one for each number of nodes, with the given options of ``megatron-sts launch slurm``; ``read`` tells of them, or of any other runs,
once they have ended. Strong scaling keeps the global batch that the config has, weak scaling gives the config's to the
smallest number of nodes and grows with them.

Shown are medians over the steps after the first ones, with the middle half of them: schedules of VTC and LDS are run through in
so few steps, so that theirs are spread by more than noise. Efficiency is a device's tokens a second beside that of the smallest
run of the same stage.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_sts.config.errors import ConfigError, refuse
from megatron_sts.config.load import load
from megatron_sts.report.fields import PARTS, RATES
from megatron_sts.report.run import Line, Run, read_run

STEADY = (
    "stages.*.epochs=null",
    "stages.*.optimizer.warmup_steps=0",
    "checkpoint.interval_steps=null",
    "evaluation.num_questions=0",
    "logging.interval_steps=1",
    "logging.tensorboard=false",
)
"""Nothing but steps, each with its line."""
FIRST_STEPS = 5
"""Left out: they allocate, choose algorithms and fill the readers' queues."""
LEAST_STEPS = FIRST_STEPS + 2
"""A stage: of fewer that count there is no spread."""


@dataclass(frozen=True)
class Spread:
    """Of one number over a stage's steady steps."""

    median: float
    lower: float
    upper: float
    """The middle half lies between them."""


@dataclass(frozen=True)
class Steady:
    """A stage of a run."""

    run: str
    stage: str
    num_ranks: int
    global_batch_size: int
    num_steps: int
    """Those that are counted."""
    step_time_s: Spread
    rates: dict[str, Spread]
    """Those that the run knows: no MFU without a peak."""
    parts_s: dict[str, float]
    """Medians of the mean rank's seconds a step."""
    slowest_rank: int | None
    """Of ranks with the same to do; None: no two have."""
    slower_by: float | None
    environment: dict[str, Any]
    """What computed, as the run wrote it."""
    efficiency: float | None = None


def measure(run: Run) -> Iterator[Steady]:
    """Each stage with steps after the first ones."""
    resolved = run.config["resolved"]
    batches = {stage["name"]: stage["batch"]["global_batch_size"] for stage in run.config["stages"]}
    for stage, lines in run.steps.items():
        steady = lines[FIRST_STEPS:]
        if steady and PARTS[0] not in steady[0]:
            raise ConfigError(
                f"{run.folder}: stage {stage} was trained by a version that does not tell where its time went"
            )
        if len(steady) < 2:
            raise ConfigError(f"{run.folder}: stage {stage} has {len(lines)} steps; {LEAST_STEPS} are needed")
        ranks = run.ranks.get(stage, {})
        yield Steady(
            run=str(run.folder),
            stage=stage,
            num_ranks=resolved["world_size"],
            global_batch_size=batches[stage],
            num_steps=len(steady),
            step_time_s=_spread(steady, "step_time_s"),
            rates={name: _spread(steady, name) for name in RATES if steady[0].get(name) is not None},
            parts_s={part: statistics.median(line[part] for line in steady) for part in PARTS},
            slowest_rank=ranks.get("slowest"),
            slower_by=ranks.get("slower_by"),
            environment=run.config.get("kernels", {}),
        )


def _spread(lines: Sequence[Line], field: str) -> Spread:
    lower, median, upper = statistics.quantiles((line[field] for line in lines), n=4, method="inclusive")
    return Spread(median, lower, upper)


def with_efficiency(found: Sequence[Steady]) -> list[Steady]:
    """Of each stage beside its run on the fewest ranks."""
    compared = []
    for one in sorted(found, key=lambda each: (each.stage, each.num_ranks)):
        base = next((each for each in compared if each.stage == one.stage), one)
        rate = one.rates["tokens_per_s_per_device"].median / base.rates["tokens_per_s_per_device"].median
        compared.append(Steady(**{**vars(one), "efficiency": rate}))
    return compared


def machine() -> dict[str, Any]:
    """Where ``run`` measured."""
    import torch

    from megatron_sts.runtime.device import current_device

    return {
        "host": platform.node(),
        "device": current_device().name,
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": os.environ.get("OMP_NUM_THREADS"),
    }


def check_steps(args: argparse.Namespace) -> None:
    """Refuses runs that would be too short, before they take their time."""
    for stage in load(args.config, [*steady_settings(args.steps), *args.overrides]).stages:
        if stage.steps is None or stage.steps < LEAST_STEPS:
            steps = "null" if stage.steps is None else stage.steps
            refuse(
                f"stages.{stage.name}.steps",
                steps,
                f"the first {FIRST_STEPS} do not count",
                f"--steps {LEAST_STEPS} at least",
            )


def command_run(args: argparse.Namespace) -> tuple[list[Steady], dict[str, Any]]:
    """Trains on local ranks, in a folder that is kept if it was named."""
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="throughput-") as unnamed:
        folder = args.out or Path(unnamed)
        words = [sys.executable, "-m", "megatron_sts", "train", str(args.config), *steady_settings(args.steps)]
        words += [*args.overrides, "--run-dir", str(folder), *(["--nproc", str(args.nproc)] if args.nproc else [])]
        done = subprocess.run(words, stdout=sys.stderr)
        if done.returncode:
            raise SystemExit(done.returncode)
        return list(measure(read_run(folder))), facts


def command_submit(args: argparse.Namespace) -> None:
    """Gives SLURM a run for each number of nodes."""
    from megatron_sts.cli import main as megatron_sts

    smallest = min(args.nodes)
    batches = {stage.name: stage.batch.global_batch_size for stage in load(args.config, args.overrides).stages}
    for nodes in sorted(args.nodes):
        words = ["launch", "slurm", str(args.config), "--nodes", str(nodes), *args.options]
        words += ["--run-dir", str(args.out / f"{args.scaling}-{nodes:04d}")]
        words += [*steady_settings(args.steps), "parallel.data_parallel_size=null", *args.overrides]
        if args.scaling == "weak":
            if any(size * nodes % smallest for size in batches.values()):
                raise ConfigError(f"--nodes={nodes}: no whole number of the samples that {smallest} nodes have a step")
            words += [
                f"stages.{name}.batch.global_batch_size={size * nodes // smallest}" for name, size in batches.items()
            ]
        if status := megatron_sts(words):
            raise SystemExit(status)
    print(f"when they have ended: python tools/bench_throughput.py read {args.out}/{args.scaling}-*")


def steady_settings(num_steps: int) -> list[str]:
    """Overrides for a run of so many steps a stage."""
    return [*STEADY, f"stages.*.steps={num_steps}"]


def show(found: Sequence[Steady]) -> None:
    """A column a stage and run: how fast, and where the time goes."""
    table = Table("", *(f"{one.stage}, {one.num_ranks} ranks" for one in found))
    cells = [_cells(one) for one in found]
    for name in cells[0]:
        table.add_row(name, *(each[name] for each in cells))
    Console().print(table)


def _cells(one: Steady) -> dict[str, str]:
    step, rates = one.step_time_s, {name: each.median for name, each in one.rates.items()}
    slowest = "-" if one.slowest_rank is None else f"{one.slowest_rank}, by {one.slower_by:.0%}"
    return {
        "global batch": str(one.global_batch_size),
        "step": f"{step.median:.4g} s",
        "half of the steps": f"{step.lower:.4g} to {step.upper:.4g}",
        "tokens/s": f"{rates['tokens_per_s']:,.0f}",
        "images/s": f"{rates['images_per_s']:,.4g}",
        "tokens/s a device": f"{rates['tokens_per_s_per_device']:,.0f}",
        "efficiency": f"{one.efficiency:.2f}",
        "TFLOP/s a device": f"{rates['tflops_per_device']:.3g}",
        "MFU": f"{rates['mfu']:.1%}" if "mfu" in rates else "-",
        **{
            part.removesuffix("_s").replace("_", " "): f"{part_s / step.median:.1%}"
            for part, part_s in one.parts_s.items()
        },
        "slowest rank": slowest,
    }


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="on local ranks")
    run.add_argument("--nproc", type=int, help="ranks (default: the product of the config's parallel sizes)")
    submit = commands.add_parser("submit", help="on a SLURM cluster")
    submit.add_argument("--nodes", type=int, nargs="+", required=True, help="numbers of nodes, a job each")
    submit.add_argument("--scaling", choices=("weak", "strong"), required=True)
    submit.add_argument(
        "--options", nargs=argparse.REMAINDER, default=[], help="the last: of megatron-sts launch slurm"
    )
    for each, out in ((run, None), (submit, Path("runs/scaling"))):
        each.add_argument("config", type=Path)
        each.add_argument("overrides", nargs="*", help="key.path=value")
        each.add_argument(
            "--steps",
            type=int,
            default=25,
            help=f"a stage, {LEAST_STEPS} at least; the first {FIRST_STEPS} do not count",
        )
        each.add_argument(
            "--out", type=Path, default=out, help=f"where the runs are written{' and kept' if out is None else ''}"
        )
    read = commands.add_parser("read", help="what runs came to")
    read.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    for each in (run, read):
        each.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _read(folders: Sequence[Path]) -> list[Steady]:
    return [one for folder in folders for one in measure(read_run(folder))]


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    try:
        if args.command != "read":
            check_steps(args)
        if args.command == "submit":
            command_submit(args)
            return
        found, facts = command_run(args) if args.command == "run" else (_read(args.runs), {})
        found = with_efficiency(found)
    except ConfigError as error:
        parser.error(str(error))
    if args.json:
        print(json.dumps({"machine": facts, "stages": [asdict(one) for one in found]}))
    else:
        show(found)


if __name__ == "__main__":
    main()
