"""What a run needs of each rank's memory, and what ranks exchange, for ``plan``: collects and prints."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.cost.activations import Kernels
from megatron_sts.cost.communication import communication
from megatron_sts.cost.peak import CONTEXT_BYTES, PeakMemory, peak_memory
from megatron_sts.cost.step import StepShape, dense_step
from megatron_sts.plan.step_shapes import mean_steps

GIB, MIB = 2**30, 2**20
GROUPS = ("tp", "cp", "pp", "dp")
"""Shown; the other groups exchange little."""


def assumed_kernels(resolved: Resolved) -> Kernels:
    """Whose layers GPUs would run: Transformer Engine's, unless the config says otherwise or trains in fp32, as CPUs do."""
    config = resolved.config
    is_torch = (
        config.kernels.layers == "torch" or config.precision.params == "fp32" or config.precision.fp8 == "emulate"
    )
    return "torch" if is_torch else "engine"


def outline_bytes(resolved: Resolved, memory_gib: float | None) -> dict[str, Any]:
    """JSON-ready; per-rank lists have one entry a pipeline rank. ``memory_gib``: of the device, if it is known."""
    kernels = assumed_kernels(resolved)
    stages = {stage.name: _stage(resolved, stage, kernels, memory_gib) for stage in resolved.stages}
    context_bytes = 0 if memory_gib is None else CONTEXT_BYTES
    return {"kernels": kernels, "device_gib": memory_gib, "context_bytes": context_bytes, "stages": stages}


def _stage(resolved: Resolved, stage: ResolvedStage, kernels: Kernels, memory_gib: float | None) -> dict[str, Any]:
    dense, mean = [(1.0, dense_step(resolved, stage, stage.uncompressed))], mean_steps(resolved, stage)
    return {
        "memory_per_rank": [_memory(peak, memory_gib) for peak in peak_memory(resolved, stage, kernels)],
        "communicated_per_rank": _communicated(resolved, stage, mean, kernels),
        "communicated_per_rank_dense": _communicated(resolved, stage, dense, kernels),
    }


def _memory(peak: PeakMemory, memory_gib: float | None) -> dict[str, Any]:
    """Bytes; ``other``: logits beside their copies, weights' gradients, FP8 copies, buffers, padding, on a device CUDA's and NCCL's own."""
    state, total = asdict(peak.state), peak.allocated_bytes if memory_gib is None else peak.total_bytes
    shown = {name: state.pop(name) for name in ("weights_bytes", "gradients_bytes", "optimizer_bytes")}
    others = total - sum(shown.values()) - peak.activations_bytes
    headroom = None if memory_gib is None else round(memory_gib * GIB) - total
    return {
        **shown,
        "activations_bytes": peak.activations_bytes,
        "other_bytes": others,
        "total_bytes": total,
        "allocated_bytes": peak.allocated_bytes,
        "headroom_bytes": headroom,
        "passes_in_flight": peak.num_in_flight,
    }


def _communicated(
    resolved: Resolved, stage: ResolvedStage, steps: list[tuple[float, StepShape]], kernels: Kernels
) -> list[dict[str, dict[str, float]]]:
    """Bytes a step by group and kind, in the mean over ``steps`` with their shares."""
    ranks: list[dict[str, dict[str, float]]] = []
    for share, step in steps:
        of_ranks = communication(resolved, stage, step, kernels)
        ranks = ranks or [defaultdict(lambda: defaultdict(float)) for _ in of_ranks]
        for found, lines in zip(ranks, of_ranks, strict=True):
            for line in lines:
                found[line.group][line.kind] += share * line.num_bytes
    return ranks


def print_bytes(facts: dict[str, Any], console: Console) -> None:
    """Two tables a stage, which fit 80 columns, and what does not fit a device."""
    device = facts["device_gib"]
    for name, stage in facts["stages"].items():
        unit, size = _unit(stage)
        held = Table(
            *("rank", "weights", "grads", "Adam", "activations", "other", "total"),
            *(() if device is None else ("free",)),
            title=f"{name}: {unit} of a pipeline rank at its peak",
            caption=_caption_of_memory(facts),
        )
        groups = [group for group in GROUPS if _has(stage, group)]
        sent = Table(
            "rank",
            *(group.upper() for group in groups),
            title=f"{name}: {unit} that it exchanges in a mean step (without LDS and VTC)",
            caption=_caption_of_traffic(unit),
        )
        for rank, memory in enumerate(stage["memory_per_rank"]):
            held.add_row(str(rank), *_cells(memory, size))
            sent.add_row(str(rank), *_exchanged(stage, rank, size))
        console.print(held)
        if groups:
            console.print(sent)
        for rank, memory in enumerate(stage["memory_per_rank"]):
            if (memory["headroom_bytes"] or 0) < 0:
                console.print(f"[bold]Does not fit[/]: {name}, {_too_large(rank, memory, device)}", highlight=False)


def fits(facts: dict[str, Any]) -> bool:
    """Whether every rank of every stage fits the device, if one is known."""
    ranks = (memory for stage in facts["stages"].values() for memory in stage["memory_per_rank"])
    return all((memory["headroom_bytes"] or 0) >= 0 for memory in ranks)


def _unit(stage: dict[str, Any]) -> tuple[str, int]:
    """In which a stage's bytes are shown."""
    largest = max(memory["allocated_bytes"] for memory in stage["memory_per_rank"])
    return ("GiB", GIB) if largest >= GIB else ("MiB", MIB)


def _caption_of_memory(facts: dict[str, Any]) -> str:
    kernels = {"torch": "torch's", "engine": "Transformer Engine's"}[facts["kernels"]]
    assumed = (
        f", and {facts['context_bytes'] / GIB:.0f} GiB assumed for CUDA and NCCL" if facts["context_bytes"] else ""
    )
    return f"{kernels} layers. other: logits, weights' gradients, FP8 copies, buffers{assumed}."


def _caption_of_traffic(unit: str) -> str:
    return (
        f"In tensor-, context-, pipeline- and data-parallel groups: {unit} of whole tensors handed to collectives, and what is "
        "sent to other stages."
    )


def _has(stage: dict[str, Any], group: str) -> bool:
    return any(group in found for found in stage["communicated_per_rank_dense"])


def _cells(memory: dict[str, Any], unit: int) -> list[str]:
    names = ("weights", "gradients", "optimizer", "activations", "other", "total", "headroom")
    values = (memory[f"{name}_bytes"] for name in names)
    return [f"{value / unit:.2f}" for value in values if value is not None]


def _exchanged(stage: dict[str, Any], rank: int, unit: int) -> list[str]:
    """Of each group that any rank has."""
    mean, dense = stage["communicated_per_rank"][rank], stage["communicated_per_rank_dense"][rank]
    cells = []
    for group in GROUPS:
        if _has(stage, group):
            sizes = [sum(found.get(group, {}).values()) / unit for found in (mean, dense)]
            cells.append(f"{sizes[0]:.2f}" if sizes[0] == sizes[1] else f"{sizes[0]:.2f} ({sizes[1]:.2f})")
    return cells


def _too_large(rank: int, memory: dict[str, Any], device_gib: float) -> str:
    """One line: which rank, by how much, and what helps against its largest part."""
    remedies = {
        "activations_bytes": "lower batch.micro_batch_size, or set parallel.sequence_parallel or recompute",
        "optimizer_bytes": "set parallel.use_distributed_optimizer, or use more ranks",
        "weights_bytes": "raise parallel.tensor_model_parallel_size or pipeline_model_parallel_size",
        "gradients_bytes": "raise parallel.tensor_model_parallel_size or pipeline_model_parallel_size",
        "other_bytes": "lower batch.micro_batch_size",
    }
    largest = max(remedies, key=lambda name: memory[name])
    return (
        f"pipeline rank {rank}: {memory['total_bytes'] / GIB:.1f} GiB of {device_gib:g}, most of it "
        f"{largest.removesuffix('_bytes')}; {remedies[largest]}"
    )
