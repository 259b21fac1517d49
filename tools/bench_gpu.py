"""A slice of a 7B or 13B LLaVA on one GPU: what STS and FP8 save, in time and memory, beside what their FLOPs promise.

    python tools/bench_gpu.py [--preset llava15_7b] [--formats torch te tensorwise ...] [--json]

alignment: every layer of the preset, frozen, with and without VTC. finetune: the preset's width with ``--num-layers`` layers
that train, dense and with a quarter, a half and three quarters of them skipped. Each step is timed next to a dense one of the
same process; ratios are medians over pairs. TFLOP/s count the work a step needed, causal attention as half a square. A format
whose run fails is named in the table, the others go on, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fixed_steps import step_seconds
from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatron_sts.commands.bytes import assumed_kernels
from megatron_sts.config.load import load
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.schema import LdsConfig
from megatron_sts.config.tokens import TokenCounts
from megatron_sts.cost.flops import TokenLoad, device_peak_tflops, step_flops
from megatron_sts.cost.memory import memory_per_rank
from megatron_sts.cost.peak import peak_memory
from megatron_sts.data.batch import Batch
from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask, dense_mask, draw_mask
from megatron_sts.lds.placement import placement
from megatron_sts.mcore import groups
from megatron_sts.model.init import build_model
from megatron_sts.plan.resolved import resolve_planned
from megatron_sts.runtime.device import current_device
from megatron_sts.runtime.dist import process_group
from megatron_sts.runtime.memory import peak_memory_bytes, reset_peak_memory
from megatron_sts.train.feed import Feed
from megatron_sts.train.stage import Stage, build_stage

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FORMATS = {
    "torch": ["kernels.layers=torch"],
    "te": ["kernels.layers=transformer-engine"],
    **{recipe: [f"precision.fp8={recipe}"] for recipe in ("tensorwise", "delayed", "blockwise", "mxfp8")},
}
ONE_GPU = [
    "parallel.tensor_model_parallel_size=1", "parallel.data_parallel_size=1", "parallel.sequence_parallel=false",
    "parallel.use_distributed_optimizer=false", "stages.*.epochs=null", "stages.*.steps=1000",
]  # fmt: skip
SKIP_FRACTIONS = (0.25, 0.5, 0.75)
NUM_WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """A step's data and skipped layers."""

    name: str
    batches: Sequence[Batch]
    mask: SkipMask

    def flops(self, stage: Stage) -> int:
        """Of one step."""
        whole = sum((batch.load for batch in self.batches), TokenLoad())
        return step_flops(stage.resolved, stage.spec, whole, layers_executed=stage.num_layers - self.mask.num_skipped)


def resolved_run(args: argparse.Namespace, fmt: str, *overrides: str) -> Resolved:
    """The preset on one rank in one of the formats."""
    sizes = {"alignment": args.alignment_micro_batch_size, "finetune": args.micro_batch_size}
    batches = [
        f"stages.{stage}.batch.{name}={count}"
        for stage, size in sizes.items()
        for name, count in (("micro_batch_size", size), ("global_batch_size", size * args.num_microbatches))
    ]
    config = load(EXAMPLES / args.preset / "config.yaml", [*ONE_GPU, *FORMATS[fmt], *batches, *overrides])
    return resolve_planned(config, world_size=1)


def alignment(args: argparse.Namespace, fmt: str) -> list[dict[str, Any]]:
    """The whole model, its language model frozen: dense, and with the preset's VTC."""
    sparse, dense = (resolved_run(args, fmt, *more) for more in ((), ("stages.alignment.vtc=null",)))
    layers = dense_mask(0, 0, dense.config.model.language.num_layers)

    def cases(stage: Stage) -> list[Case]:
        feeds = {name: Feed(run, run.stages[0], stage.place) for name, run in (("dense", dense), ("VTC", sparse))}
        return [Case(name, feed.step(0).batches, layers) for name, feed in feeds.items()]

    return measure(args, dense, dense.stages[0], cases)


def finetune(args: argparse.Namespace, fmt: str) -> list[dict[str, Any]]:
    """A slice of the model that trains, with more and more of its layers skipped."""
    run = resolved_run(args, fmt, f"model.language.num_layers={args.num_layers}")
    spec = run.stages[1]

    def cases(stage: Stage) -> list[Case]:
        batches = Feed(run, spec, stage.place).step(0).batches
        found = [Case("dense", batches, dense_mask(1, 0, args.num_layers))]
        for fraction in SKIP_FRACTIONS:
            lds = LdsConfig(sampler="balanced", alpha=fraction, epsilon=0.0, schedule="constant")
            mask = draw_mask(lds, 1, 1, 0, spec.num_steps, placement(run, spec))
            found.append(Case(f"LDS {fraction:.0%}", batches, mask))
        return found

    return measure(args, run, spec, cases)


PARTS = {"alignment": alignment, "finetune": finetune}


def measure(
    args: argparse.Namespace, run: Resolved, spec: ResolvedStage, cases_of: Callable[[Stage], list[Case]]
) -> list[dict[str, Any]]:
    """Builds the stage, times its cases and takes it down."""
    place, gate = groups.initialize(run.config.parallel, seed=1), SkipGate()
    try:
        stage = build_stage(run, spec, place, build_model(run, gate), gate)
        try:
            return time_cases(args, stage, *cases_of(stage))
        finally:
            stage.close()
    finally:
        groups.destroy()


def time_cases(args: argparse.Namespace, stage: Stage, dense: Case, *others: Case) -> list[dict[str, Any]]:
    """One line a case, each timed next to the first."""
    seconds = {case.name: partial(step_seconds, stage, case.batches, case.mask) for case in (dense, *others)}
    peaks = {case.name: peak_bytes(seconds[case.name]) for case in (dense, *others)}
    pairs = {case.name: [(seconds["dense"](), seconds[case.name]()) for _ in range(args.num_pairs)] for case in others}
    pairs["dense"] = [(first, first) for timed in pairs.values() for first, _ in timed]
    return [describe(stage, dense, case, pairs[case.name], peaks[case.name]) for case in (dense, *others)]


def peak_bytes(step: Callable[[], float]) -> int:
    """Of steps after the first, which allocates what later ones reuse."""
    step()
    reset_peak_memory()
    for _ in range(NUM_WARM_UP):
        step()
    return peak_memory_bytes()


def describe(stage: Stage, dense: Case, case: Case, pairs: list[tuple[float, float]], peak: int) -> dict[str, Any]:
    """One line of the report."""
    run, step_time_s = stage.resolved, statistics.median(second for _, second in pairs)
    flops = case.flops(stage)
    tflops, fp8 = flops / step_time_s / 1e12, run.config.precision.engine_recipe
    peak_tflops = device_peak_tflops(current_device().name, "bf16" if fp8 is None else "fp8")
    return {
        "stage": stage.spec.name,
        "case": case.name,
        "num_layers": stage.num_layers,
        "tokens_per_row": case.batches[0].sequence_length,
        "step_time_s": step_time_s,
        "time_ratio": statistics.median(second / first for first, second in pairs),
        "flops_ratio": flops / dense.flops(stage),
        "samples_per_s": sum(batch.num_samples for batch in case.batches) / step_time_s,
        "tflops": tflops,
        "mfu": tflops / peak_tflops if peak_tflops else None,
        "peak_memory_bytes": peak,
        "planned_peak_bytes": planned_peak_bytes(run, stage.spec, case),
        "planned_state_bytes": memory_per_rank(run, stage.spec)[0].total_bytes,
    }


def planned_peak_bytes(run: Resolved, spec: ResolvedStage, case: Case) -> int:
    """What ``cost.peak`` says of the case's rows and skipped layers."""
    batch = case.batches[0]
    counts = TokenCounts(visual_tokens_out=batch.num_kept[:1] or (0,), sequence_length=batch.sequence_length)
    skipped = [[layer for layer, skips in enumerate(row) if skips] for row in case.mask.rows]
    [peak] = peak_memory(run, spec, assumed_kernels(run), counts=counts, skipped=skipped)
    return peak.allocated_bytes


def bench(args: argparse.Namespace, fmt: str) -> dict[str, Any]:
    """Both stages in one format, or why it failed: a GPU's software may refuse in ways of its own."""
    started, lines, problems = time.monotonic(), [], []
    for part in (PARTS[name] for name in args.stages):
        try:
            lines += part(args, fmt)
        except Exception as error:
            problems.append(f"{part.__name__}: {type(error).__name__}: {str(error).strip()[:300]}")
            if args.traceback:
                sys.excepthook(type(error), error, error.__traceback__)
        gc.collect()
        torch.cuda.empty_cache()
    return {"format": fmt, "lines": lines, "problem": "; ".join(problems), "wall_s": time.monotonic() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--traceback", action="store_true", help="print where a format failed")
    parser.add_argument(
        "--preset", default="llava15_7b", help="a folder of examples/ with stages alignment and finetune"
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["torch", "te", "tensorwise"])
    parser.add_argument("--stages", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--num-layers", type=int, default=8, help="decoder layers of the slice that trains")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="of finetune")
    parser.add_argument("--alignment-micro-batch-size", type=int, default=16, help="large, or launches take the time")
    parser.add_argument("--num-microbatches", type=int, default=2)
    parser.add_argument("--num-pairs", type=int, default=8, help="times that each step is timed next to a dense one")
    args = parser.parse_args()
    if not current_device().is_cuda:
        raise SystemExit(
            "bench_gpu: needs a CUDA device; on CPUs tools/bench_lds.py and tools/bench_vtc.py measure ratios"
        )
    facts = {"device": current_device().name, "preset": args.preset, "torch": torch.__version__}
    formats = []
    with process_group(600.0):
        for fmt in track(args.formats, console=Console(stderr=True), transient=True):
            formats.append(bench(args, fmt))
            if not args.json:
                print_table(facts, formats[-1])
    if args.json:
        print(json.dumps({**facts, "formats": formats}))
    raise SystemExit(any(one["problem"] for one in formats))


def print_table(facts: dict[str, Any], found: dict[str, Any]) -> None:
    """One format's."""
    console = Console(highlight=False, width=140)
    title = f"{facts['preset']}, {found['format']}, {facts['device']}, torch {facts['torch']}: {found['wall_s']:.0f} s in all"
    table = Table(title=title)
    for column in ("stage", "layers", "case", "tokens", "step", "time/dense", "FLOPs/dense", "samples/s", "TFLOP/s", "MFU", "peak", "planned", "state"):  # fmt: skip
        table.add_column(column)
    for line in found["lines"]:
        table.add_row(
            line["stage"], str(line["num_layers"]), line["case"], str(line["tokens_per_row"]),
            f"{line['step_time_s'] * 1e3:.0f} ms", f"{line['time_ratio']:.3f}", f"{line['flops_ratio']:.3f}",
            f"{line['samples_per_s']:.1f}", f"{line['tflops']:.0f}", "-" if line["mfu"] is None else f"{line['mfu']:.1%}",
            *(f"{line[size] / 2**30:.1f} GiB" for size in ("peak_memory_bytes", "planned_peak_bytes", "planned_state_bytes")),
        )  # fmt: skip
    console.print(table)
    if found["problem"]:
        console.print(f"failed: {found['problem']}")


if __name__ == "__main__":
    main()
