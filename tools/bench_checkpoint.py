"""How long saving holds the training loop: written by the loop itself, and while training goes on (checkpoint.asynchronous).

    python tools/bench_checkpoint.py [--ranks 1] [--layers 8] [--hidden 512] [--saves 10] [--folder DIR] [--json]

Trains a language model with its projector and tower on one rank, or on ``--ranks`` data-parallel ones with the distributed
optimizer (its first rank is measured), saving every fourth step, each way in turn. The stall of a save is
the time for which the loop is held: taking it, and, once it is written, putting it in place. Medians over the saves but for the
first, in which memory is allocated. "Step" is the median step while nothing is written and while something is: the writer needs a
processor of its own, and on a GPU's host it has one. ``--folder`` decides which disk is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_sts.config.resolve import resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.mcore import groups
from megatron_sts.train import loop
from megatron_sts.train.checkpoint import Checkpointer
from megatron_sts.train.interrupt import StopRequest
from megatron_sts.train.resume import Progress
from megatron_sts.train.stage import Stage

STEPS_PER_SAVE = 4
WAYS = ("synchronous", "asynchronous")


class Timed(Checkpointer):
    """Notes how long the loop waits for it."""

    stalls: list[float] = []  # noqa: RUF012  # of the one run that goes on
    """Seconds by save."""

    def save(self, stage: Stage, progress: Progress, *, must: bool = False, wait: bool = False) -> None:
        """As it is, timed."""
        began = time.perf_counter()
        super().save(stage, progress, must=must, wait=wait)
        self.stalls.append(time.perf_counter() - began)

    def settle(self) -> None:
        """As it is, timed; part of the last save."""
        began = time.perf_counter()
        super().settle()
        if self.stalls:
            self.stalls[-1] += time.perf_counter() - began


def config(ranks: int, layers: int, hidden: int, saves: int, *, asynchronous: bool) -> dict[str, Any]:
    """One stage; nothing is measured at its end."""
    heads = {"num_attention_heads": 8}
    return {
        "model": {
            "vision": {**heads, "hidden_size": 64, "num_layers": 2, "image_size": 64, "patch_size": 8},
            "language": {
                **heads, "hidden_size": hidden, "num_layers": layers, "num_query_groups": 8, "ffn_hidden_size": 3 * hidden, "vocab_size": 1024,
            },
        },
        "parallel": {"data_parallel_size": ranks, "use_distributed_optimizer": ranks > 1},
        "stages": [
            {
                "name": "only",
                "data": {"mode": "questions", "num_turns": 1},
                "steps": STEPS_PER_SAVE * (saves + 1) + 2,
                "optimizer": {"lr": 1e-4},
                "batch": {"global_batch_size": 2 * ranks, "micro_batch_size": 2, "sequence_length": 104},
            }
        ],
        "checkpoint": {"interval_steps": STEPS_PER_SAVE, "keep_last": 1, "asynchronous": asynchronous},
        "logging": {"tensorboard": False},
    }  # fmt: skip


def measure(folder: Path, ranks: int, layers: int, hidden: int, saves: int, *, asynchronous: bool) -> dict[str, float]:
    """Medians of one way to save."""
    Timed.stalls = []
    run_dir = folder / ("asynchronous" if asynchronous else "synchronous")
    written = config(ranks, layers, hidden, saves, asynchronous=asynchronous)
    resolved = resolve(RunConfig.model_validate(written), world_size=ranks)
    loop.Checkpointer = Timed
    loop.run(resolved, run_dir, StopRequest())
    groups.destroy()
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step_time_s"] for line in lines if "loss" in line][STEPS_PER_SAVE:]
    newest = max((run_dir / "checkpoints").iterdir())
    return {
        "stall_s": statistics.median(Timed.stalls[1 : saves + 1]),
        "longest_stall_s": max(Timed.stalls[1 : saves + 1]),
        "step_s": statistics.median(steps[STEPS_PER_SAVE - 1 :: STEPS_PER_SAVE]),
        "step_after_save_s": statistics.median(steps[::STEPS_PER_SAVE]),
        "bytes": sum(path.stat().st_size for path in newest.rglob("*") if path.is_file()),
    }


def on_ranks(arguments: argparse.Namespace, folder: Path, way: str) -> dict[str, float]:
    """``measure`` on fresh local ranks; what the first of them found."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.ranks}"]
    command = [*launcher, __file__, *sys.argv[1:], f"--rank-of={way}", f"--folder={folder}"]
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found: dict[str, float] = json.loads((folder / f"{way}.json").read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel ranks (default: 1)")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--saves", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rank-of", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = arguments.ranks, arguments.layers, arguments.hidden, arguments.saves
    if way := arguments.rank_of:
        of_rank = measure(arguments.folder, *sizes, asynchronous=way == "asynchronous")
        if os.environ["RANK"] == "0":
            (arguments.folder / f"{way}.json").write_text(json.dumps(of_rank))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder, is_alone = Path(name), arguments.ranks == 1
        found = {
            way: measure(folder, *sizes, asynchronous=way == "asynchronous")
            if is_alone
            else on_ranks(arguments, folder, way)
            for way in WAYS
        }
    ratio = found["asynchronous"]["stall_s"] / found["synchronous"]["stall_s"]
    if arguments.json:
        print(json.dumps({**found, "stall_ratio": ratio}, indent=2))
        return
    table = Table("saves", "stall s (median)", "longest", "step s", "step after a save s", "MB")
    for name, each in found.items():
        numbers = [each[key] for key in ("stall_s", "longest_stall_s", "step_s", "step_after_save_s")]
        table.add_row(name, *(f"{number:.3f}" for number in numbers), f"{each['bytes'] / 1e6:.0f}")
    Console().print(table)
    print(f"an asynchronous save holds the loop for {ratio:.1%} of a synchronous one")


if __name__ == "__main__":
    main()
