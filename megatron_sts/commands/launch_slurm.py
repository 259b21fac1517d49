"""``megatron-sts launch slurm``: a batch script for this config, checked before it is submitted, kept in the run's folder."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sts.commands.arguments import Commands, add_command, add_config, add_folder, add_group, positive
from megatron_sts.commands.counted import counted
from megatron_sts.commands.interrupted import INTERRUPTED
from megatron_sts.commands.launch_options import ARRAY, PASSED_ON, check_options, warn_of_holder
from megatron_sts.commands.train import default_run_dir
from megatron_sts.config.errors import ConfigError, refuse

if TYPE_CHECKING:
    from megatron_sts.config.resolve import Resolved
    from megatron_sts.config.schema import RunConfig
    from megatron_sts.launch.slurm_script import Job


def add(commands: Commands) -> None:
    """``launch`` and what it holds."""
    slurm = add_command(
        add_group(commands, "launch", help="submit a run to a cluster", description="Submit a run to a cluster."),
        "slurm",
        run,
        help="write and submit a SLURM job",
        description="Check a run against the nodes it is to have, write its batch script, its config and which code this is into "
        "RUN_DIR/launch, and submit it. At the time limit it saves and goes back into the queue. See launch/slurm/README.md.",
    )
    add_config(slurm)
    slurm.add_argument("--nodes", "-N", type=positive, metavar="N", required=True, help="how many nodes")
    slurm.add_argument("--gpus-per-node", type=int, metavar="N", default=8, help="GPUs a node; 0: on CPUs (default: 8)")
    slurm.add_argument("--ranks-per-node", type=positive, metavar="N", help="default: the GPUs")
    slurm.add_argument(
        "--cpus-per-rank", type=positive, metavar="N", help="CPUs for each rank (default: what SLURM gives)"
    )
    slurm.add_argument("--srun-ranks", action="store_true", help="a task for each rank, instead of a torchrun a node")
    for name, help in PASSED_ON.items():
        slurm.add_argument(f"--{name}", metavar="TEXT", help=help)
    slurm.add_argument("--exclusive", action="store_true", help="whole nodes")
    slurm.add_argument("--sbatch", action="append", default=[], metavar="NAME=VALUE", help="any other option of sbatch")
    slurm.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="set in the job, as for NCCL")
    slurm.add_argument("--container", metavar="IMAGE", default="", help="image for the pyxis plugin (enroot)")
    slurm.add_argument("--python", metavar="PATH", help="the Python of the nodes or of the image (default: this one)")
    slurm.add_argument("--no-requeue", action="store_true", help="not back into the queue, for sites that forbid it")
    slurm.add_argument(
        "--chain", type=positive, metavar="N", default=1, help="this many jobs, each going on from the last"
    )
    add_folder(slurm, "--run-dir", "where the run is written (default: runs/NAME)")
    slurm.add_argument("--extend", action="store_true", help="as for train")
    slurm.add_argument(
        "--dry-run", action="store_true", help="print the script, and what was checked; write and submit nothing"
    )
    slurm.add_argument("--untested", action="store_true", help="submit also what SLURM could not start now")
    slurm.add_argument("--follow", action="store_true", help="print the log until the job ends")


def run(args: argparse.Namespace) -> int:
    """Check, write, submit, and say how to follow it."""
    from megatron_sts.launch import slurm_submit
    from megatron_sts.launch.slurm_script import render

    resolved = _check(args)
    run_dir = _run_dir(args)
    folder = _next_folder(_base(run_dir) / "launch")
    job = _job(args, run_dir, folder)
    if args.dry_run:
        print(render(job), end="")
        print(f"megatron-sts: {_told_of_dry_run(args, resolved, folder)}", file=sys.stderr)
        return 0
    if args.container and not slurm_submit.has_pyxis():
        refuse("--container", args.container, "srun has no --container-image here (the pyxis plugin of enroot)",
               "install it, or leave out --container and give --python of an environment that the nodes have")  # fmt: skip
    with _removed_if_refused(folder):
        script, code = _write(args, job, folder, resolved)
        if not args.untested:
            print(f"megatron-sts: {slurm_submit.check_startable(script)}")
        numbers = [slurm_submit.submit(script)]
    _submit_chain(script, numbers, args.chain)
    log = folder / f"job-{numbers[0]}.out"
    shown = f"{shlex.quote(str(folder))}/job-{numbers[0]}{'_*' if args.array else ''}.out"  # the shell's * stays one
    print(
        f"megatron-sts: job {', '.join(numbers)}: {counted(resolved.world_size, 'rank')} on {counted(args.nodes, 'node')}, {code}"
    )
    print(f"megatron-sts: log {shown} (each rank's: {job.run_dir}/logs), script {script}")
    print(f"megatron-sts: follow it with: tail -F {shown}; save and end it with: scancel {numbers[0]}", flush=True)
    if not args.follow:
        return 0
    try:
        slurm_submit.follow(numbers[0], log)
    except KeyboardInterrupt:
        told = f"no longer following; job {numbers[0]} goes on (scancel {numbers[0]} ends it)"
        print(f"\nmegatron-sts: {told}", file=sys.stderr)
        return INTERRUPTED
    return 0 if slurm_submit.outcome(run_dir) == "done" else 1


@contextmanager
def _removed_if_refused(folder: Path) -> Iterator[None]:
    """What SLURM did not take leaves nothing behind."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in missing[1:]:
            with suppress(OSError):
                parent.rmdir()
        raise


def _submit_chain(script: Path, numbers: list[str], length: int) -> None:
    """Submits the other jobs of a chain, whose ids ``numbers`` then has too.

    Raises:
        ConfigError: sbatch refused one; those before it are submitted.
    """
    from megatron_sts.launch import slurm_submit

    while len(numbers) < length:
        place = {"STS_CHAINED": "1"} | ({"STS_CHAIN_END": "1"} if len(numbers) + 1 == length else {})
        try:
            numbers.append(slurm_submit.submit(script, f"--dependency=afterany:{numbers[-1]}", **place))
        except ConfigError as error:
            told = f"of the {length} jobs of --chain only {', '.join(numbers)} were submitted, which scancel ends"
            raise ConfigError(f"{told}: {error}") from None


def _check(args: argparse.Namespace) -> Resolved:
    """The config with the ranks that the nodes give; every one of an array.

    Raises:
        ConfigError: they do not fit, or an option is no option.
    """
    from megatron_sts.config.load import load
    from megatron_sts.launch.slurm_submit import array_numbers
    from megatron_sts.train.resume import check_same_run

    check_options(args)
    if args.array and args.run_dir is not None and ARRAY not in str(args.run_dir):
        refuse("--run-dir", args.run_dir, "all numbers of the array would write one folder", f"put {ARRAY} into it")
    for word in [] if args.array else [*args.overrides, f"--run-dir={args.run_dir}"]:
        if ARRAY in word:
            raise ConfigError(
                f"{word}: {ARRAY} stands for the number of a job array; it needs --array, as in --array 0-3"
            )
    checked: Resolved | None = None
    for number in array_numbers(args.array) if args.array else [None]:
        overrides = [word if number is None else word.replace(ARRAY, str(number)) for word in args.overrides]
        resolved = _on_nodes(load(args.config, overrides), args)
        run_dir = Path(str(_run_dir(args)).replace(ARRAY, str(number)))
        check_same_run(resolved, run_dir, extend=args.extend)
        warn_of_holder(run_dir)
        checked = checked or resolved
    assert checked is not None
    return checked


def _on_nodes(config: RunConfig, args: argparse.Namespace) -> Resolved:
    """The config with the ranks that the nodes give.

    Raises:
        ConfigError: naming --nodes where it is they that do not fit.
    """
    from megatron_sts.plan.resolved import resolve_planned

    num_ranks = args.ranks_per_node or args.gpus_per_node
    try:
        return resolve_planned(config, world_size=args.nodes * num_ranks)
    except ConfigError as error:
        resolve_planned(config)  # raises what is wrong on any nodes
        of_node = f"{counted(num_ranks, 'rank')} a node, by --ranks-per-node, else --gpus-per-node"
        raise ConfigError(f"--nodes={args.nodes} (x {of_node}): {error}") from None


def _told_of_dry_run(args: argparse.Namespace, resolved: Resolved, folder: Path) -> str:
    parallel = resolved.config.parallel
    sizes = {
        "tensor": parallel.tensor_model_parallel_size,
        "context": parallel.context_parallel_size,
        "pipeline": parallel.pipeline_model_parallel_size,
        "data": resolved.data_parallel_size,
    }
    shape = " x ".join(f"{name} {size}" for name, size in sizes.items())
    jobs = f"an array of jobs ({args.array})" if args.array else "a job"
    if args.chain > 1:
        kind = f"arrays of jobs ({args.array} each)" if args.array else "jobs"
        jobs = f"{args.chain} {kind}, each going on once the one before has ended,"
    return (
        f"the config fits {counted(args.nodes, 'node')} x {counted(resolved.world_size // args.nodes, 'rank')} = {shape}; without --dry-run "
        f"{jobs} would be submitted as {folder / 'job.sbatch'}; nothing was written or submitted, and SLURM was not asked"
    )


def _run_dir(args: argparse.Namespace) -> Path:
    default = default_run_dir(args.config)
    if args.array:
        default = default.with_name(f"{default.name}-{ARRAY}")
    return Path.cwd() / (args.run_dir or default)


def _base(run_dir: Path) -> Path:
    """Where scripts and logs of all numbers of an array lie together."""
    parents = [run_dir, *run_dir.parents]
    return next(path for path in parents if ARRAY not in str(path))


def _next_folder(launches: Path) -> Path:
    """A run may be submitted again and again: each time has its folder."""
    taken = [int(path.name) for path in launches.glob("*") if path.name.isdecimal()]
    return launches / f"{max(taken, default=0) + 1:03d}"


def _job(args: argparse.Namespace, run_dir: Path, folder: Path) -> Job:
    from megatron_sts.launch.slurm_script import Job

    # What was submitted runs, though the file may be changed while the job waits.
    arguments = [str(folder / "config.yaml"), *args.overrides, *(["--extend"] if args.extend else [])]
    return Job(
        directives=list(_directives(args, folder)),
        folder=Path.cwd(),
        run_dir=run_dir,
        python=args.python or sys.executable,
        ranks_per_node=args.ranks_per_node or args.gpus_per_node,
        launcher="srun" if args.srun_ranks else "torchrun",
        arguments=arguments,
        container=args.container,
        environment=dict(word.split("=", 1) for word in args.env) | ({"STS_CHAIN": "1"} if args.chain > 1 else {}),
    )


def _directives(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str | None]]:
    from megatron_sts.launch.slurm_script import lasting
    from megatron_sts.launch.slurm_submit import options_of

    num_ranks = args.ranks_per_node or args.gpus_per_node
    per_task = 1 if args.srun_ranks else num_ranks
    name = default_run_dir(args.config).name
    output = str(folder / ("job-%A_%a.out" if args.array else "job-%j.out"))
    given = dict(options_of(args.sbatch))
    if "job-name" not in given:
        yield "job-name", "".join(character if character.isalnum() or character in "-_." else "-" for character in name)
    yield "nodes", str(args.nodes)
    yield "ntasks-per-node", str(num_ranks if args.srun_ranks else 1)
    if args.gpus_per_node:
        yield "gpus-per-node", str(args.gpus_per_node)
    if args.cpus_per_rank:
        yield "cpus-per-task", str(args.cpus_per_rank * per_task)
    for option in PASSED_ON:
        if (value := getattr(args, option)) is not None:
            yield option, value
    if args.exclusive:
        yield "exclusive", None
    yield "output", str(folder).replace("%", "%%") + output.removeprefix(str(folder))
    for option, value in lasting():
        if option == "requeue" and (args.no_requeue or args.chain > 1):
            option = "no-requeue"
        if option not in given:
            yield option, value
    yield from given.items()


def _write(args: argparse.Namespace, job: Job, folder: Path, resolved: Resolved) -> tuple[Path, str]:
    """What is submitted, into ``folder``; the script, and which code this is."""
    from megatron_sts.config.load import CONFIG_NAME, dump
    from megatron_sts.launch import snapshot
    from megatron_sts.launch.slurm_script import render

    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"--run-dir={folder.parents[1]}: {error.strerror}; give a folder that can be written"
        ) from None
    shutil.copyfile(args.config / CONFIG_NAME if args.config.is_dir() else args.config, folder / "config.yaml")
    dump(resolved, folder / "config.resolved.yaml")
    code = snapshot.write(folder)
    script = folder / "job.sbatch"
    script.write_text(render(job), encoding="utf-8")
    script.chmod(script.stat().st_mode | 0o100)  # no more readers than the umask lets: --env may hold a secret
    return script, code
