"""Which products of a decoder layer multiply faster in bf16 than in FP8 (``precision.fp8_where: auto``). Torch-free.

FP8 halves what a product computes and what sequence parallelism gathers for it, but casts its operands and launches more kernels:
with few tokens, or a matrix that tensor parallelism has cut small, these take longer than they save.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain, combinations

from megatron_sts.config.precision import PRODUCTS, Product
from megatron_sts.config.resolve import Resolved, ResolvedStage, with_bf16_products
from megatron_sts.lds.schedule import mean_skip_fraction
from megatron_sts.plan.hardware import Hardware, check_formats, load_hardware
from megatron_sts.plan.steps import grid
from megatron_sts.plan.timing.kernels import memory_s
from megatron_sts.plan.timing.passes import Passes
from megatron_sts.plan.timing.step import pieces_of
from megatron_sts.plan.timing.update import fp8_cast_bytes
from megatron_sts.plan.timing.workload import Workload, workload_of

SUBSETS: tuple[tuple[Product, ...], ...] = tuple(
    chain.from_iterable(combinations(PRODUCTS, number) for number in range(len(PRODUCTS) + 1))
)
"""Products that may leave FP8 together, few first."""


def choose_bf16_products(resolved: Resolved) -> tuple[tuple[Product, ...], ...]:
    """For each stage the products without which FP8 is fastest on ``precision.fp8_hardware``.

    A pure function of the run and of what that names, so that every rank comes to the same.

    Raises:
        ConfigError: there is no such hardware, or it does not have the recipe.
    """
    precision, option = resolved.config.precision, "precision.fp8_hardware"
    hardware = load_hardware(precision.fp8_hardware, option)
    if precision.fp8 == "emulate":  # stands for what a GPU would do
        precision = precision.model_copy(update={"fp8": "tensorwise"})
        resolved = resolved.model_copy(update={"config": resolved.config.model_copy(update={"precision": precision})})
    check_formats(hardware, precision, option)
    return tuple(_of_stage(hardware, resolved, stage) for stage in resolved.stages)


def chosen_anew(resolved: Resolved) -> Resolved:
    """The run after its shapes have changed: ``auto`` decides again."""
    if resolved.config.precision.fp8_where != "auto":
        return resolved
    return with_bf16_products(resolved, choose_bf16_products(resolved))


def fastest(hardware: Hardware, workloads: Counter[Workload], share_run: float = 1.0) -> tuple[Product, ...]:
    """The products that leave FP8 so that passes take least, in the mean over micro-batches of these shapes, in which this share of the
    layers runs; few rather than many."""

    def total_s(left: tuple[Product, ...]) -> float:
        parted = ((each.model_copy(update={"bf16_products": left}), count) for each, count in workloads.items())
        return sum(count * passes_s(hardware, each, share_run) for each, count in parted)

    return min(SUBSETS, key=total_s)


def passes_s(hardware: Hardware, workload: Workload, share_run: float = 1.0) -> float:
    """Forward and backward passes of a step's micro-batches through a pipeline of equally many layers a rank, with casts of weights.

    A rank takes as long as its GPU computes or its host launches, which it does ahead of what stands before and behind the layers. All
    micro-batches go through the rank that takes longest, one through the others, too.
    """
    pieces, pp = pieces_of(hardware, workload), workload.pipeline_parallel_size
    num_layers = workload.model.language.num_layers / pp
    layers = pieces.layer * (share_run * num_layers)
    ends = {0: pieces.first, pp - 1: pieces.last} if pp > 1 else {0: pieces.first + pieces.last}
    ranks_s = [_rank_s(layers + ends.get(rank, Passes())) for rank in range(pp)]
    casts_s = num_layers * memory_s(hardware.device, [fp8_cast_bytes(workload)])
    return (workload.num_microbatches - 1) * max(ranks_s) + sum(ranks_s) + casts_s


def _rank_s(passes: Passes) -> float:
    computes = passes.forward.total + passes.backward.total
    return max(computes, passes.forward_launch_s + passes.backward_launch_s)


def _of_stage(hardware: Hardware, resolved: Resolved, stage: ResolvedStage) -> tuple[Product, ...]:
    shapes = Counter(stage.tokens(step) for step in grid(stage.num_steps))
    workloads = Counter[Workload]()
    for counts, number in shapes.items():
        workload = workload_of(resolved, stage, counts)
        if workload.fp8 is not None:  # else its layers are in bf16 anyway (``min_tokens_for_fp8``)
            workloads[workload] += number
    lds, num_layers = stage.config.lds, resolved.config.model.language.num_layers
    share_run = 1 - mean_skip_fraction(lds, stage.num_steps, num_layers) if lds is not None else 1.0
    return fastest(hardware, workloads, share_run)
