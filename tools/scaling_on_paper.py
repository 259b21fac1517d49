"""What a start and a step cost in everything that grows with the number of ranks, measured without them as far as one machine can.

    python tools/scaling_on_paper.py [--example examples/llava_llama3_70b] [--worlds 8 64 512 4096 16384] [--write] [--json]

The example's tensor- and pipeline-parallel sizes, data-parallel copies for the rest, as many micro-batches a copy as it has (worlds too
small for that have no pipeline). Each world is measured in a process of its own: model-parallel groups and skip masks under a fake
process group; the meeting of ranks in a real store of this machine; the plan of a checkpoint by the first rank's own code, which is
handed the plans of the others (``scaling/plans.py``); what every rank hears from all others, made of copies of this one's. What a
network or a file system takes is in none of it. Worlds beyond ``--plans-up-to`` are not planned but extrapolated, and marked.
With --write the table goes into the example's README.md, between the lines <!-- scaling --> and <!-- /scaling -->.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from plan_table import write_into

from megatron_sts.config.load import load
from megatron_sts.config.resolve import Resolved, resolve

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "llava_llama3_70b"
WORLDS = (8, 64, 512, 4096, 16384)
ROUNDS = 10
"""Of a world without a pipeline, which has no chunks to skip together."""
GROWING = (
    "num_items",
    "gathered_bytes",
    "global_plan_s",
    "global_plan_rss_bytes",
    "finish_s",
    "metadata_bytes",
    "read_s",
    "read_rss_bytes",
)
"""What of a checkpoint's plan is proportional to the number of ranks."""

Format = Callable[[float], str]


def seconds(value: float) -> str:
    return f"{value:.2g} s" if value < 10 else f"{value:.0f} s"


def size(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def number(value: float) -> str:
    return f"{value:,.0f}"


ROWS: tuple[tuple[str, str, Format], ...] = (
    ("skip masks of 64 steps drawn and compared", "masks_s", seconds),
    ("… sent to each rank for that", "masks_bytes", size),
    ("groups created", "groups_s", seconds),
    ("… their number", "num_groups", number),
    ("ranks meet, of rank 0's processor", "meeting_s", seconds),
    ("… requests that rank 0's store serves", "num_requests", number),
    ("digests of code and config compared", "digests_s", seconds),
    ("… gathered by each rank", "digests_bytes", size),
    ("checkpoint: rank 0's own plan", "own_plan_s", seconds),
    ("… its size", "own_plan_bytes", size),
    ("… parts of tensors in all plans", "num_items", number),
    ("… plans gathered by rank 0", "gathered_bytes", size),
    ("… its global plan, once a stage", "global_plan_s", seconds),
    ("… memory for that", "global_plan_rss_bytes", size),
    ("… `.metadata` written", "finish_s", seconds),
    ("… its size", "metadata_bytes", size),
    ("… read by each rank that goes on from it", "read_s", seconds),
    ("… memory for that", "read_rss_bytes", size),
    ("data index of 665,298 samples, a rank that reads", "index_s", seconds),
    ("… memory for that", "index_rss_bytes", size),
    ("times of ranks compared (every 100 steps)", "times_s", seconds),
    ("… gathered by each rank", "times_bytes", size),
    ("… line in metrics.jsonl", "times_line_bytes", size),
    ("heartbeats: small files rewritten a second", "beats_per_s", number),
)
"""What is measured: in words, its field, and how it is shown."""
FROM_A_SHARE = ("index_s", "index_rss_bytes")
"""Measured on a share of the samples."""


def of_world(example: Path, num_ranks: int) -> Resolved:
    """The example on so many ranks."""
    config = load(example)
    tensor, pipeline = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    overrides = []
    if num_ranks % (tensor * pipeline):
        pipeline = 1
        overrides = [
            "parallel.pipeline_model_parallel_size=1",
            "parallel.virtual_pipeline_model_parallel_size=null",
            "parallel.layout=even",
        ]
        overrides += [
            f"stages.{s.name}.lds.rounds={ROUNDS}" for s in config.stages if s.lds and s.lds.sampler == "rounds"
        ]
    copies, before = num_ranks // (tensor * pipeline), config.parallel.data_parallel_size or 1
    overrides.append(f"parallel.data_parallel_size={copies}")
    for stage in config.stages:
        overrides.append(
            f"stages.{stage.name}.batch.global_batch_size={stage.batch.global_batch_size * copies // before}"
        )
    return resolve(load(example, overrides), world_size=num_ranks)


def measure(example: Path, num_ranks: int, *, index_share: float, is_planned: bool) -> dict[str, float]:
    """Of one world, in this process: run it in a fresh one."""
    from scaling.index import index_cost
    from scaling.plans import plan_cost
    from scaling.start import gathered_cost, group_cost, meeting_cost

    from megatron_sts.dry.run import without_kernels

    resolved = without_kernels(of_world(example, num_ranks))
    stage = resolved.stages[-1].name
    found = {
        **asdict(group_cost(resolved, stage)),
        **asdict(gathered_cost(resolved)),
        **asdict(meeting_cost(num_ranks)),
    }
    with tempfile.TemporaryDirectory() as folder:
        if is_planned:
            (state := Path(folder) / "state").mkdir()
            found |= asdict(plan_cost(resolved, stage, state))
        if index_share:  # after the plan, whose growth is told from the process's peak
            found |= asdict(index_cost(Path(folder), index_share))
    return found


def extrapolated(measured: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    """Each world's numbers that were not measured there, from the largest world in which they were."""
    found: dict[int, dict[str, float]] = {}
    for world, numbers in measured.items():
        for field in sorted({field for each in measured.values() for field in each} - numbers.keys()):
            largest = max(other for other, each in measured.items() if field in each)
            factor = world / largest if field in GROWING else 1
            found.setdefault(world, {})[field] = measured[largest][field] * factor
    return found


def table(measured: dict[int, dict[str, float]]) -> str:
    """Markdown of each world's numbers."""
    guessed = extrapolated(measured)
    lines = [("", *(f"{world:,} ranks" for world in measured)), ("---", *["---:"] * len(measured))]
    for words, field, shown in ROWS:
        cells = []
        for world, numbers in measured.items():
            is_guessed = field not in numbers or field in FROM_A_SHARE
            value = numbers.get(field, guessed.get(world, {}).get(field))
            cells.append("" if value is None else f"{'≈ ' if is_guessed else ''}{shown(value)}")
        lines.append((words, *cells))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--example", type=Path, default=EXAMPLE, help="a folder with config.yaml, and README.md for --write"
    )
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS), help="numbers of ranks")
    parser.add_argument(
        "--plans-up-to",
        type=int,
        default=WORLDS[-1],
        help="ranks whose checkpoint is planned; more take minutes and memory",
    )
    parser.add_argument("--index-share", type=float, default=0.1, help="of the 665,298 samples, to be measured")
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    parser.add_argument("--json", action="store_true", help="print the numbers, by world")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    return parser


def measure_apart(words: Sequence[str]) -> dict[str, float]:
    """``measure`` in a fresh process."""
    command = [sys.executable, __file__, *words, "--in-this-process"]
    environment = {
        **os.environ,
        "RES_OPTIONS": "attempts:0",
    }  # torch looks up this machine's name at times; without DNS that takes 5 s
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    numbers: dict[str, float] = json.loads(said.splitlines()[-1])
    return numbers


def main() -> None:
    parser = arguments()
    args = parser.parse_args()
    if args.in_this_process:
        [world] = args.worlds
        is_planned = world <= args.plans_up_to
        print(json.dumps(measure(args.example, world, index_share=args.index_share, is_planned=is_planned)))
        return
    measured = {}
    for place, world in enumerate(args.worlds):
        share = args.index_share if place == 0 else 0  # the same for all
        options = [f"--example={args.example}", f"--plans-up-to={args.plans_up_to}", f"--index-share={share}"]
        measured[world] = measure_apart([f"--worlds={world}", *options])
    if args.json:
        print(json.dumps(measured))
    text = table(measured)
    if not args.write:
        print(text, end="", file=sys.stderr if args.json else sys.stdout)
        return
    try:
        write_into(args.example / "README.md", "scaling", text)
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
