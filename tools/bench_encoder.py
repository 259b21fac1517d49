"""What it brings that all ranks of a model copy encode images (``parallel.vision: spread``), beside a tower on the first stage.

    python tools/bench_encoder.py [--json] [--counted 2 4 8] [--rounds 7]

The alignment stage of a model whose frozen tower has two thirds of a step's FLOPs. Counted, from dry runs of every rank: the
FLOPs that the busiest rank executes, with ``first`` in an even layout and in the one that leaves its busiest rank least, and
with ``spread``; how many images a rank encodes, and the tower's FLOPs of the busiest rank beside the mean. Timed, on two
pipeline ranks over gloo, one thread each: steps of both in turn, ``first`` in each layout that may be its best. A ratio is the
median of pairs that follow each other, so that a machine that does other things disturbs both; seconds never leave a run.
Takes three minutes on two cores. ``chrt -r 20 python tools/bench_encoder.py`` keeps others off them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from fixed_steps import GivenBatches, step_seconds
from rich.console import Console
from rich.table import Table

from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.cost.flops import planned_load, step_work
from megatron_sts.dry.run import run as dry_run
from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.placement import placement
from megatron_sts.mcore import groups
from megatron_sts.model.init import build_model
from megatron_sts.runtime.device import current_device
from megatron_sts.runtime.dist import max_over_ranks, process_group
from megatron_sts.train.stage import build_stage
from megatron_sts.train.step import train_step

PP = "pipeline_model_parallel_size"
RESULT = "BENCH_RESULT"
Layout = tuple[int, ...]


def resolved_run(
    args: argparse.Namespace, num_stages: int, global_batch_size: int, vision: str, layout: Layout | None = None
) -> Resolved:
    """On ``num_stages`` pipeline ranks; ``layout`` None: even."""
    for num_layers in range(2, 1000):
        resolved = _resolved(args, num_stages, global_batch_size, vision, layout, num_layers)
        if tower_share(resolved) >= args.tower_share:
            return resolved
    raise ValueError("no tower is large enough")


def _resolved(
    args: argparse.Namespace, num_stages: int, global_batch_size: int, vision: str, layout: Layout | None, layers: int
) -> Resolved:
    hidden, of_tower = args.hidden_size, args.tower_hidden_size
    tower = {"num_layers": layers, "hidden_size": of_tower, "num_attention_heads": max(of_tower // 64, 1)}
    language = {"num_layers": args.num_layers, "hidden_size": hidden, "num_attention_heads": max(hidden // 64, 1)}
    stage = {
        "name": "alignment",
        "freeze": ["vision", "language"],
        "data": {"mode": "caption"},
        "steps": 1000,
        "optimizer": {"lr": 1e-3},
        "batch": {
            "global_batch_size": global_batch_size,
            "micro_batch_size": args.micro_batch_size,
            "sequence_length": 104,
        },
    }
    written = {
        "model": {
            "vision": {**tower, "image_size": 64, "patch_size": 8, "feature_layer": -1},
            "language": {**language, "ffn_hidden_size": hidden * 11 // 4, "vocab_size": 1024},
        },
        "parallel": {PP: num_stages, "vision": vision, "layout": layout or "even"},
        "stages": [stage],
    }
    return resolve(RunConfig.model_validate(written), world_size=num_stages)


def tower_share(resolved: Resolved) -> float:
    """Of a step's FLOPs."""
    [stage] = resolved.stages
    work = step_work(resolved, stage, planned_load(resolved, stage, stage.typical))
    return work.tower / (work.before + resolved.config.model.language.num_layers * work.layer + work.after)


def best_layout(resolved: Resolved) -> Layout:
    """The layers of each rank that leave the busiest one least: one after the other to the rank with least to do."""
    load = list(placement(resolved, resolved.stages[0]).fixed_work)
    layers = [0] * len(load)
    for _ in range(resolved.config.model.language.num_layers):
        rank = load.index(min(load))
        load[rank], layers[rank] = load[rank] + 1, layers[rank] + 1
    return tuple(layers)


def counted(args: argparse.Namespace, num_stages: int) -> dict[str, Any]:
    """Executed FLOPs of each rank, an image more than ``images_a_rank`` on one of them."""
    size = num_stages * args.images_a_rank + 1
    even = resolved_run(args, num_stages, -(-size // args.micro_batch_size) * args.micro_batch_size, "first")
    size = even.stages[0].config.batch.global_batch_size
    best = best_layout(even)
    runs = {
        "first, even": even,
        "first, best": resolved_run(args, num_stages, size, "first", best),
        "spread": resolved_run(args, num_stages, size, "spread"),
    }
    accounts = {name: [dry_run(each, rank) for rank in range(num_stages)] for name, each in runs.items()}
    busiest = {name: max(each.total_work.model for each in of_ranks) for name, of_ranks in accounts.items()}
    tower = [account.work_of("vision").model for account in accounts["spread"]]
    return {
        "pipeline_ranks": num_stages,
        "tower_share": tower_share(even),
        "best_layout": best,
        "busiest_rank_flops": busiest,
        "spread_over_best": busiest["spread"] / busiest["first, best"],
        "images_a_rank": [round(size * flops / sum(tower)) for flops in tower],
        "tower_largest_over_mean": max(tower) * num_stages / sum(tower),
    }


class Bench:
    """One model on this rank."""

    def __init__(self, resolved: Resolved) -> None:
        gate = SkipGate()
        self.stage = build_stage(resolved, resolved.stages[0], groups.place(), build_model(resolved, gate), gate)
        self.batches = self.stage.batches.step(0)
        self.stage.batches.close()
        for _ in range(2):
            self.seconds()

    def seconds(self) -> float:
        """One step; the slowest rank's time."""
        dist.barrier()
        [seconds] = max_over_ranks([step_seconds(self.stage, self.batches)])
        return seconds

    def share_of_first_stage(self) -> float:
        """Of all ranks' time in passes."""
        result = train_step(replace(self.stage, batches=GivenBatches(self.batches)), 0)
        own = [result.pass_s if rank == self.stage.place.pp_rank else 0.0 for rank in range(self.stage.place.pp_size)]
        first, *others = max_over_ranks(own)
        return first / (first + sum(others))


def timed(args: argparse.Namespace) -> dict[str, Any]:
    """Medians over rounds, in each of which all are run once; on two ranks."""
    size = args.num_microbatches * args.micro_batch_size
    even = resolved_run(args, 2, size, "first")
    first = best_layout(even)[0]
    layouts = {(layers, args.num_layers - layers) for layers in (first, first + 1, args.num_layers // 2)}
    benches = {f"first, {list(each)}": Bench(resolved_run(args, 2, size, "first", each)) for each in sorted(layouts)}
    spread = Bench(resolved_run(args, 2, size, "spread"))
    tower = [benches[f"first, {[0, args.num_layers]}"].share_of_first_stage() for _ in range(3)] if not first else []
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in benches}
    for _ in range(args.rounds):
        for name, bench in benches.items():
            pairs[name].append((spread.seconds(), bench.seconds()))
    ratios = {name: [a / b for a, b in of_name] for name, of_name in pairs.items()}
    best = max(ratios, key=lambda name: statistics.median(ratios[name]))
    return {
        "tower_share": tower_share(even),
        "tower_share_of_time": statistics.median(tower) if tower else None,
        "first_seconds": {name: statistics.median(b for _, b in of_name) for name, of_name in pairs.items()},
        "spread_seconds": statistics.median(a for of_name in pairs.values() for a, _ in of_name),
        "spread_over_first": {name: statistics.median(each) for name, each in ratios.items()},
        "best": best,
        "spread_over_best": statistics.median(ratios[best]),
        "spread_over_best_range": [min(ratios[best]), max(ratios[best])],
    }


def run_rank(args: argparse.Namespace) -> None:
    """What each of the two ranks does; rank 0 leaves the result for the parent."""
    with process_group(600.0):
        size = args.num_microbatches * args.micro_batch_size
        groups.initialize(resolved_run(args, 2, size, "spread").config.parallel, seed=1)
        found = timed(args)
        if dist.get_rank() == 0:
            Path(os.environ[RESULT]).write_text(json.dumps(found))


def start_ranks(argv: Sequence[str]) -> dict[str, Any]:
    """Times on two fresh local ranks."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        subprocess.run(
            [*launcher, __file__, *argv, "--rank"],
            env={**os.environ, RESULT: str(result), "OMP_NUM_THREADS": "1"},
            check=True,
            stdout=sys.stderr,
        )
        found: dict[str, Any] = json.loads(result.read_text())
    return found


def rows(found: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Of the table of what was counted."""
    for each in found["counted"]:
        flops = each["busiest_rank_flops"]
        yield (
            str(each["pipeline_ranks"]),
            f"{each['tower_share']:.2f}",
            *(f"{flops[name] / 1e9:.1f}" for name in ("first, even", "first, best", "spread")),
            f"{each['spread_over_best']:.3f}",
            f"{min(each['images_a_rank'])} to {max(each['images_a_rank'])}",
            f"{each['tower_largest_over_mean']:.3f}",
        )


def print_tables(found: dict[str, Any]) -> None:
    """On stdout."""
    console = Console()
    columns = (
        "ranks",
        "tower",
        "first, even",
        "first, best",
        "spread",
        "spread / best",
        "images a rank",
        "tower, largest / mean",
    )
    table = Table(*columns, title="GFLOP of the busiest rank in a step", title_justify="left")
    for row in rows(found):
        table.add_row(*row)
    if found["counted"]:
        console.print(table)
    if (times := found["timed"]) is not None:
        low, high = times["spread_over_best_range"]
        share = times["tower_share_of_time"]
        console.print(
            f"tower: {times['tower_share']:.2f} of the FLOPs, {share and round(share, 2)} of the time in passes"
        )
        console.print(f"two ranks, seconds a step: spread {times['spread_seconds']:.3f}", highlight=False)
        for name, seconds in times["first_seconds"].items():
            console.print(f"  {name} {seconds:.3f}: {times['spread_over_first'][name]:.3f}", highlight=False)
        console.print(f"spread / {times['best']}: {times['spread_over_best']:.3f} ({low:.3f} to {high:.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--counted", type=int, nargs="*", default=[2, 4, 8], help="numbers of pipeline ranks to count")
    parser.add_argument("--rounds", type=int, default=7, help="times that each is timed; 0: none")
    parser.add_argument("--tower-share", type=float, default=2 / 3, help="of a step's FLOPs, at least")
    parser.add_argument("--num-layers", type=int, default=8, help="decoder layers")
    parser.add_argument("--hidden-size", type=int, default=256, help="of the decoder")
    parser.add_argument("--tower-hidden-size", type=int, default=384)
    parser.add_argument("--num-microbatches", type=int, default=16, help="of a timed step")
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--images-a-rank", type=int, default=33, help="of a counted step")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        run_rank(args)
        return
    found: dict[str, Any] = {"device": current_device().name}
    found["counted"] = [counted(args, num_stages) for num_stages in args.counted]
    found["timed"] = start_ranks(sys.argv[1:]) if args.rounds else None
    print(json.dumps(found)) if args.json else print_tables(found)


if __name__ == "__main__":
    main()
