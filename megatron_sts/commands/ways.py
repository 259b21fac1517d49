"""The fastest ways to run a config on its GPUs, for ``plan --search``: collects and prints."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_sts.commands.seconds import duration
from megatron_sts.config.resolve import Resolved
from megatron_sts.plan.hardware import Hardware
from megatron_sts.plan.search import search
from megatron_sts.plan.timing.run import check_rates
from megatron_sts.plan.timing.workload import Assumptions

MOST_SHOWN = 6


def outline_search(hardware: Hardware, resolved: Resolved, assumptions: Assumptions) -> dict[str, Any]:
    """JSON-ready, the fastest way first."""
    check_rates(hardware, resolved)
    searched = search(hardware, resolved, assumptions)
    return {
        "num_ways": searched.num_ways,
        "num_too_large": searched.num_too_large,
        "memory_gib": hardware.device.memory_gib,
        "found": [
            {
                "hours": found.hours,
                "gpu_hours": found.hours * resolved.world_size,
                "peak_gib": found.peak_bytes / 2**30,
                "tensor": found.resolved.config.parallel.tensor_model_parallel_size,
                "pipeline": found.resolved.config.parallel.pipeline_model_parallel_size,
                "chunks": len(found.resolved.layers_per_chunk),
                "context": found.resolved.config.parallel.context_parallel_size,
                "data": found.resolved.data_parallel_size,
                "recompute": found.resolved.config.parallel.recompute,
                "micro_batch_sizes": {
                    stage.name: stage.config.batch.micro_batch_size for stage in found.resolved.stages
                },
                "overrides": found.overrides,
            }
            for found in searched.found
        ],
    }


def print_search(facts: dict[str, Any], hours: float, console: Console, *, fits: bool = True) -> None:
    """A table of what was found; ``hours``: of the config as it stands, which ``fits`` the memory or does not."""
    if not facts["found"]:
        console.print(
            f"Search: nothing fits {facts['memory_gib']:.0f} GiB a GPU, however small the micro-batches.",
            highlight=False,
        )
        return
    table = Table(
        "training",
        "TP",
        "CP",
        "PP",
        "chunks",
        "DP",
        "micro-batches",
        "recompute",
        "peak, GiB",
        title="The fastest ways that fit",
        caption="TP within a node, CP too unless rows are long, micro-batches of a power of two: a config beyond that may be faster",
    )
    for found in facts["found"][:MOST_SHOWN]:
        sizes = ", ".join(f"{name} {size}" for name, size in found["micro_batch_sizes"].items())
        parallel = (str(found[key]) for key in ("tensor", "context", "pipeline", "chunks", "data"))
        table.add_row(duration(found["hours"]), *parallel, sizes, found["recompute"], f"{found['peak_gib']:.1f}")
    console.print(table)
    best = facts["found"][0]
    console.print(
        f"The fastest takes {best['hours'] / hours:.2f} of the hours of the config as it stands"
        f"{'' if fits else ', which does not fit'}. To run so:",
        highlight=False,
    )
    console.print(" ".join(best["overrides"]), highlight=False, soft_wrap=True, markup=False)
