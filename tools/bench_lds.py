"""How much of the FLOPs that LDS saves arrives as wall-clock: dense and skipping steps, alternated in one run.

    python tools/bench_lds.py [--json] [--cases "one rank" PP2 VPP3 VPP6 DP2]

For each layout (one rank; two pipeline ranks; two with three and with six chunks each) and sampler, steps with a constant
skip probability and with the paper's schedule. ideal_saving is 1 - executed / dense FLOPs of the very masks that ran;
realised_saving is 1 - their time / that of the dense steps between them; efficiency is realised / ideal. Interleaved layouts
have the faster of two for the dense steps, the same chunks and one chunk a rank; ``bound`` is what no schedule with equal
chunks can pass, m v / (m v + pp - 1) with m micro-batches, v chunks a rank and pp ranks; dropping_cost is what a step pays
for masks and schedules, as a share of a dense step. Then the cost of a skipped layer,
and overlapped against plain gradient reduction on two data-parallel ranks. CPU ranks use one thread each. Seconds never
leave a run: compare ratios.
Takes about an hour on two cores, which nothing else may use: two ranks wait for each other, and for who runs beside.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from fixed_steps import step_seconds
from rich.console import Console
from rich.table import Table

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import LdsConfig, RunConfig
from megatron_sts.cost.flops import planned_load, step_flops
from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask, dense_mask, draw_mask
from megatron_sts.lds.placement import placement
from megatron_sts.lds.rounds import active_rounds
from megatron_sts.mcore import groups
from megatron_sts.mcore.units import schedule_units
from megatron_sts.model.init import build_model
from megatron_sts.runtime.device import current_device
from megatron_sts.runtime.dist import max_over_ranks, process_group
from megatron_sts.train.stage import build_stage

Fractions = tuple[float | None, ...]
"""Shares of the layers; None: the paper's schedule with alpha = epsilon = 0.5."""
QUARTERS: Fractions = (0.0, 0.25, 0.5, 0.75, None)
THIRDS: Fractions = (1 / 3, 1 / 2, 2 / 3, None)
PP, VPP = "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"


@dataclass(frozen=True)
class Case:
    """A layout, and the samplers that are timed on it."""

    num_ranks: int
    parallel: dict[str, Any]
    samplers: dict[str, Fractions]

    @property
    def num_chunks(self) -> int:
        """A pipeline rank's."""
        return int(self.parallel.get(VPP, 1))


CONTIGUOUS: dict[str, Fractions] = {"balanced": QUARTERS, "bernoulli": QUARTERS}
INTERLEAVED: dict[str, Fractions] = {"rounds": THIRDS, "quota": (1 / 2, None), "bernoulli": (1 / 2, None)}
CASES = {
    "one rank": Case(1, {}, CONTIGUOUS),
    "PP2": Case(2, {PP: 2}, CONTIGUOUS),
    "VPP3": Case(2, {PP: 2, VPP: 3}, INTERLEAVED),
    "VPP6": Case(2, {PP: 2, VPP: 6}, INTERLEAVED),
    "DP2": Case(2, {"data_parallel_size": 2}, {}),
}
RESULT = "BENCH_RESULT"


class Bench:
    """One model on this rank, and its steps with any mask."""

    def __init__(
        self, args: argparse.Namespace, num_layers: int, parallel: dict[str, Any], num_microbatches: int | None = None
    ) -> None:
        self.resolved = resolved_run(args, num_layers, parallel, num_microbatches or args.num_microbatches)
        self.spec = self.resolved.stages[0]
        gate = SkipGate()
        place = groups.place()
        self.stage = build_stage(self.resolved, self.spec, place, build_model(self.resolved, gate), gate)
        self.batches = self.stage.batches.step(0)
        self.dense = dense_mask(0, 0, num_layers)
        for _ in range(2):
            self.seconds(self.dense)

    def seconds(self, mask: SkipMask) -> float:
        """One step; the slowest rank's time."""
        dist.barrier()
        [seconds] = max_over_ranks([step_seconds(self.stage, self.batches, mask)])
        return seconds

    def flops(self, mask: SkipMask) -> int:
        """Executed by all ranks in a step with this mask."""
        load = planned_load(self.resolved, self.spec, self.spec.tokens(0))
        return step_flops(self.resolved, self.spec, load, layers_executed=mask.num_layers - mask.num_skipped)


def resolved_run(
    args: argparse.Namespace, num_layers: int, parallel: dict[str, Any], num_microbatches: int
) -> Resolved:
    """A decoder that dwarfs the tower before it, on drawn scenes."""
    vision = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "image_size": 64, "patch_size": 8}
    hidden = args.hidden_size
    language = {"num_layers": num_layers, "hidden_size": hidden, "num_attention_heads": max(hidden // 64, 2)}
    samples = args.micro_batch_size
    batch = {"global_batch_size": num_microbatches * samples * parallel.get("data_parallel_size", 1)}
    return resolve(
        RunConfig.model_validate(
            {
                "model": {
                    "vision": vision,
                    "language": {**language, "ffn_hidden_size": hidden * 11 // 4, "vocab_size": 1024},
                },
                "parallel": parallel,
                "stages": [
                    {
                        "name": "finetune",
                        "freeze": ["vision"],
                        "steps": args.schedule_steps,
                        "optimizer": {"lr": 1e-4},
                        "batch": {**batch, "micro_batch_size": samples, "sequence_length": args.sequence_length},
                        "lds": {},
                    }
                ],
            }
        ),
        world_size=math.prod(parallel.get(size, 1) for size in (PP, "data_parallel_size")),
    )


def masks_of(bench: Bench, sampler: str, skip_fraction: float | None, count: int) -> list[SkipMask]:
    """``count`` masks, spread over the schedule."""
    shape = {} if skip_fraction is None else {"alpha": skip_fraction, "epsilon": 0.0, "schedule": "constant"}
    lds = LdsConfig.model_validate({"sampler": sampler, **shape})
    num_steps = bench.spec.num_steps
    steps = [(2 * i + 1) * num_steps // (2 * count) for i in range(count)]
    here = placement(bench.resolved, bench.spec)
    return [draw_mask(lds, 1, 0, step, num_steps, here) for step in steps]


def saving(bench: Bench, dense: Bench, masks: Sequence[SkipMask], num_passes: int) -> tuple[float, float]:
    """(ideal, realised): each mask's step between dense ones; the median of some passes over all masks."""
    ideal = 1 - sum(map(bench.flops, masks)) / (bench.flops(bench.dense) * len(masks))
    realised = []
    for _ in range(num_passes):
        of_dense = skipping = 0.0
        for mask in masks:
            of_dense += dense.seconds(dense.dense)
            skipping += bench.seconds(mask)
        realised.append(1 - skipping / of_dense)
    return ideal, statistics.median(realised)


def bench_layout(args: argparse.Namespace, name: str) -> dict[str, Any]:
    """All that is timed on one layout; on one rank also what a skipped layer costs."""
    case = CASES[name]
    if case.num_chunks > 1:
        return {"cases": [each for m in args.microbatches for each in bench_interleaved(args, name, m)]}
    bench = Bench(args, args.num_layers, case.parallel)
    cases = list(bench_samplers(args, name, bench, bench))
    overhead = {"skipped_layer_overhead": skipped_layer_overhead(args)} if dist.get_world_size() == 1 else {}
    return {"cases": cases, **overhead}


def bench_interleaved(args: argparse.Namespace, name: str, num_microbatches: int) -> Iterator[dict[str, Any]]:
    """The samplers of one interleaved layout, against the faster of two dense ones."""
    case, num_layers = CASES[name], args.interleaved_layers
    # One chunk a rank: megatron-core has one number of chunks a process, but rounds without layers are left out.
    one_chunk = [num_layers // 2] * 2 + [0] * 2 * (case.num_chunks - 1)
    layouts = (case.parallel, {**case.parallel, "layout": one_chunk})
    same, contiguous = (Bench(args, num_layers, parallel, num_microbatches) for parallel in layouts)
    pairs = [(same.seconds(same.dense), contiguous.seconds(contiguous.dense)) for _ in range(args.num_masks)]
    ratio = statistics.median(a / b for a, b in pairs)
    dropping = dropping_seconds(same) / statistics.median(seconds for pair in pairs for seconds in pair)
    units = num_microbatches * case.num_chunks
    for found in bench_samplers(args, name, same, same if ratio <= 1 else contiguous):
        facts = {"num_microbatches": num_microbatches, "dense_over_contiguous": ratio, "bound": units / (units + 1)}
        yield {**found, **facts, "dropping_cost": dropping}


def dropping_seconds(bench: Bench) -> float:
    """What a step pays for skipping by rounds besides running its layers: drawing the mask, and the schedule's units."""
    lds, here, seconds = LdsConfig(sampler="rounds"), placement(bench.resolved, bench.spec), []
    for step in range(0, bench.spec.num_steps, max(bench.spec.num_steps // 64, 1)):
        started = time.perf_counter()
        mask = draw_mask(lds, 1, 0, step, bench.spec.num_steps, here)
        schedule_units(bench.stage.chunks, active_rounds(mask, bench.resolved.layers_per_chunk))
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def bench_samplers(args: argparse.Namespace, name: str, bench: Bench, dense: Bench) -> Iterator[dict[str, Any]]:
    """Each sampler of a layout with each share of the layers."""
    for sampler, fractions in CASES[name].samplers.items():
        for skip_fraction in fractions:
            count = args.num_schedule_masks if skip_fraction is None else args.num_masks
            masks = masks_of(bench, sampler, skip_fraction, count)
            num_passes = 1 if skip_fraction is None else args.num_passes
            ideal, realised = saving(bench, dense, masks, num_passes)
            yield {
                "layout": name,
                "sampler": sampler,
                "skip_fraction": skip_fraction,
                "ideal_saving": ideal,
                "realised_saving": realised,
                "efficiency": realised / ideal if ideal else None,
            }


def skipped_layer_overhead(args: argparse.Namespace) -> float:
    """Time of a skipped layer / time of one that runs: two depths, nothing executed, against the shallow one in full."""
    num_layers = args.num_layers
    shallow, deep = (Bench(args, count, {}) for count in (num_layers, 5 * num_layers))
    idle = {bench: SkipMask(0, 0, ((True,) * bench.dense.num_layers,)) for bench in (shallow, deep)}
    shares = []
    for _ in range(3 * args.num_masks):
        nothing, more_nothing = shallow.seconds(idle[shallow]), deep.seconds(idle[deep])
        everything = shallow.seconds(shallow.dense)
        shares.append((more_nothing - nothing) / (4 * num_layers) / ((everything - nothing) / num_layers))
    return statistics.median(shares)


def bench_overlap(args: argparse.Namespace) -> dict[str, Any]:
    """Overlapped against plain gradient reduction on two data-parallel ranks: ratios of step times, dense and skipping."""
    sizes = {"data_parallel_size": 2, "use_distributed_optimizer": True}
    overlap = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    plain, overlapped = Bench(args, args.num_layers, sizes), Bench(args, args.num_layers, {**sizes, **overlap})
    ratios = {}
    half = masks_of(plain, "balanced", 0.5, 1)[0]
    for name, mask in (("dense", plain.dense), ("half_skipped", half)):
        pairs = [(overlapped.seconds(mask), plain.seconds(mask)) for _ in range(3 * args.num_masks)]
        ratios[name] = statistics.median(a / b for a, b in pairs)
    return {"overlap_over_plain": ratios}


def run_rank(args: argparse.Namespace) -> None:
    """What each rank does: one layout; rank 0 leaves the result for the parent."""
    case = CASES[args.rank_of]
    num_layers = args.interleaved_layers if case.num_chunks > 1 else args.num_layers
    with process_group(600.0):
        groups.initialize(resolved_run(args, num_layers, case.parallel, 2).config.parallel, seed=1)
        found = bench_layout(args, args.rank_of) if case.samplers else bench_overlap(args)
        if dist.get_rank() == 0:
            Path(os.environ[RESULT]).write_text(json.dumps(found))


def start_ranks(argv: Sequence[str], name: str, num_ranks: int) -> dict[str, Any]:
    """Runs one layout on fresh local ranks."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
        subprocess.run(
            [*launcher, __file__, *argv, f"--rank-of={name}"],
            env={**os.environ, RESULT: str(result), "OMP_NUM_THREADS": "1"},
            check=True,
            stdout=sys.stderr,
        )
        found: dict[str, Any] = json.loads(result.read_text())
    return found


class WithDefaults(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as it is written, and every option's default."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=WithDefaults)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="layouts to time")
    parser.add_argument("--num-layers", type=int, default=8)
    parser.add_argument("--interleaved-layers", type=int, default=12, help="layers of VPP3 and VPP6")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--sequence-length", type=int, default=256, help="tokens a sample")
    parser.add_argument("--num-microbatches", type=int, default=4, help="a step and data-parallel rank")
    parser.add_argument("--microbatches", type=int, nargs="+", default=[8, 16], help="the same for VPP3 and VPP6")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="samples a micro-batch")
    parser.add_argument("--num-masks", type=int, default=4, help="masks a case")
    parser.add_argument(
        "--num-passes",
        type=int,
        default=3,
        help="times that each mask is timed; those of the paper's schedule are timed once",
    )
    parser.add_argument(
        "--num-schedule-masks", type=int, default=24, help="the same for the paper's schedule, whose saving is smallest"
    )
    parser.add_argument("--schedule-steps", type=int, default=1000, help="length of the paper's schedule")
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        run_rank(args)
        return
    check(parser, args)
    found: dict[str, Any] = {"device": current_device().name, "cases": []}
    for name in args.cases:
        print(f"bench_lds: {name}", file=sys.stderr, flush=True)
        result = start_ranks(sys.argv[1:], name, CASES[name].num_ranks)
        found["cases"] += result.pop("cases", [])
        found.update(result)
    print(json.dumps(found)) if args.json else print_tables(found)


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends with one line for sizes that no rank could run."""
    for name in args.cases:
        case = CASES[name]
        num_layers = args.interleaved_layers if case.num_chunks > 1 else args.num_layers
        try:
            for count in args.microbatches if case.num_chunks > 1 else [args.num_microbatches]:
                resolved_run(args, num_layers, case.parallel, count)
        except ConfigError as error:
            parser.error(f"{name}: {error}")


def print_tables(found: dict[str, Any]) -> None:
    columns = (
        "layout",
        "micro-batches",
        "sampler",
        "skipped",
        "ideal saving",
        "realised saving",
        "efficiency",
        "bound",
    )
    table = Table(*columns, title=found["device"])
    for case in found["cases"]:
        fraction = "paper" if case["skip_fraction"] is None else f"{case['skip_fraction']:.3g}"
        numbers = (f"{case['ideal_saving']:.3f}", f"{case['realised_saving']:.3f}")
        ends = ["-" if case.get(name) is None else f"{case[name]:.3f}" for name in ("efficiency", "bound")]
        table.add_row(case["layout"], str(case.get("num_microbatches", "")), case["sampler"], fraction, *numbers, *ends)
    console = Console()
    console.print(table)
    for name, cost in {
        (c["layout"], c["num_microbatches"]): c["dropping_cost"] for c in found["cases"] if "bound" in c
    }.items():
        console.print(
            f"{name[0]}, {name[1]} micro-batches: masks and schedules of rounds cost {cost:.3%} of a dense step"
        )
    if "skipped_layer_overhead" in found:
        console.print(f"a skipped layer costs {found['skipped_layer_overhead']:.2%} of one that runs")
    for name, ratio in found.get("overlap_over_plain", {}).items():
        console.print(f"DP2, {name}: overlapped / plain step time {ratio:.3f}")


if __name__ == "__main__":
    main()
