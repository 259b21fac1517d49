"""What a resolved config comes to, for ``--dry-run``. Runs nothing, derives nothing: only collects and prints."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from megatron_sts.commands.bytes import assumed_kernels
from megatron_sts.commands.notes import notes
from megatron_sts.commands.obstacles import obstacles, other_run, unreadable_data
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.schema import LdsConfig
from megatron_sts.config.tokens import TokenCounts
from megatron_sts.cost.flops import planned_load, step_flops
from megatron_sts.cost.memory import memory_per_rank, parameters, parameters_per_rank
from megatron_sts.cost.peak import CONTEXT_BYTES, peak_memory
from megatron_sts.lds.schedule import mean_skip_fraction, skip_probabilities
from megatron_sts.runtime.probe import check_usable
from megatron_sts.train.resume import is_begun, is_over

_TOWER = {
    "spread": "on all ranks of a model copy, which each encode a share of a step's images (parallel.vision: spread)",
    "first": "on the first pipeline stage (parallel.vision: first)",
}
Outline = dict[str, Any]
"""JSON-ready; the keys are those that ``--json`` prints."""


def outline(resolved: Resolved, run_dir: Path, *, extend: bool) -> Outline:
    """Layout, token counts, parameters per rank and FLOPs a step.

    Per-rank lists have one entry a pipeline rank. FLOPs are for all ranks and a full batch: without VTC and LDS
    (dense), with VTC (all layers), and with both, in the mean over the stage. ``context_bytes``: of a peak, what is assumed for CUDA
    and NCCL. ``obstacles``: what would keep a start with
    ``run_dir`` from going on, and whether that is this machine's (another may have the files or devices).
    """
    parallel = resolved.config.parallel
    found = [
        *obstacles(resolved, is_going_on=_is_going_on(run_dir)),
        *unreadable_data(resolved),
        *other_run(resolved, run_dir, extend=extend),
    ]
    return {
        "world_size": resolved.world_size,
        "parallel": {
            "tensor": parallel.tensor_model_parallel_size,
            "pipeline": parallel.pipeline_model_parallel_size,
            "virtual_pipeline": parallel.virtual_pipeline_model_parallel_size or 1,
            "context": parallel.context_parallel_size,
            "data": resolved.data_parallel_size,
            "sequence_parallel": parallel.sequence_parallel,
        },
        "vision_tower": None if resolved.config.model.vision is None else parallel.vision,
        "precision": resolved.config.precision.model_dump(mode="json"),
        "kernels": kernels_here(resolved),
        "layers_per_chunk": [list(chunks) for chunks in resolved.layers_per_chunk],
        "parameters": parameters(resolved),
        "parameters_per_rank": parameters_per_rank(resolved),
        "context_bytes": CONTEXT_BYTES,
        "stages": [_stage(resolved, stage) for stage in resolved.stages],
        "notes": list(notes(resolved)),
        "obstacles": [asdict(obstacle) for obstacle in found],
    }


def kernels_here(resolved: Resolved) -> Outline:
    """What this machine would compute with, or why it cannot run the config: another one may."""
    try:
        return asdict(check_usable(resolved.config))
    except ConfigError as error:
        return {"problem": str(error)}


def _is_going_on(run_dir: Path) -> bool:
    """Whether a run there needs no weights to begin with; also if that cannot be told, which ``other_run`` says."""
    try:
        return is_begun(run_dir) or is_over(run_dir)
    except ConfigError:
        return True


def _stage(resolved: Resolved, stage: ResolvedStage) -> Outline:
    config = stage.config
    counts = stage.typical
    load, dense = (planned_load(resolved, stage, shape) for shape in (counts, stage.uncompressed))
    num_layers = resolved.config.model.language.num_layers
    skipped = 0.0 if config.lds is None else float(mean_skip_fraction(config.lds, stage.num_steps, num_layers))
    return {
        "name": stage.name,
        "freeze": list(config.freeze),
        "num_steps": stage.num_steps,
        "global_batch_size": config.batch.global_batch_size,
        "micro_batch_size": config.batch.micro_batch_size,
        "num_microbatches": stage.num_microbatches,
        "balance": config.batch.balance,
        "visual_tokens_in": stage.visual_tokens_in,
        "visual_tokens_out": counts.of_image(0),
        "sequence_length": counts.sequence_length,
        "uncompressed_sequence_length": stage.uncompressed.sequence_length,
        "tokens_per_step": load.num_tokens,
        "images_per_step": load.num_images,
        "flops_per_step_dense": step_flops(resolved, stage, dense, layers_executed=num_layers),
        "flops_per_step_all_layers": mean_flops(resolved, stage, None),
        "flops_per_step_mean": mean_flops(resolved, stage, config.lds),
        "mean_skip_fraction": skipped,
        "state_bytes_per_rank": [memory.total_bytes for memory in memory_per_rank(resolved, stage)],
        "peak_bytes_per_rank": [peak.total_bytes for peak in peak_memory(resolved, stage, assumed_kernels(resolved))],
        "vtc": None if config.vtc is None else config.vtc.model_dump(mode="json"),
        "lds": None if config.lds is None else config.lds.model_dump(mode="json"),
        "bf16_products": list(stage.bf16_products),
    }


def mean_flops(resolved: Resolved, stage: ResolvedStage, lds: LdsConfig | None) -> int:
    """Of a step in the mean over the stage, with ``lds``: its steps may have different shapes, and those with most tokens skip least."""
    num_layers, layers_executed = resolved.config.model.language.num_layers, defaultdict[TokenCounts, list[float]](list)
    for step in range(stage.num_steps):
        skipped = 0.0 if lds is None else float(skip_probabilities(lds, step, stage.num_steps, num_layers).sum())
        layers_executed[stage.tokens(step)].append(num_layers - skipped)
    total = sum(
        len(layers) * step_flops(resolved, stage, planned_load(resolved, stage, shape), layers_executed=fmean(layers))
        for shape, layers in layers_executed.items()
    )
    return round(total / stage.num_steps)


def print_json(outline: Outline, stream: TextIO) -> None:
    """One JSON object."""
    print(json.dumps(outline), file=stream)


def print_table(outline: Outline) -> None:
    """Tables on stdout."""
    console = Console()
    sizes = outline["parallel"]
    console.print(
        f"[bold]{outline['world_size']} ranks[/]: tensor {sizes['tensor']} x pipeline {sizes['pipeline']} "
        f"x context {sizes['context']} x data {sizes['data']}, {sizes['virtual_pipeline']} model chunks a pipeline rank"
    )
    if outline["vision_tower"] is not None:
        console.print(f"[bold]Vision tower[/]: {_TOWER[outline['vision_tower']]}", highlight=False, soft_wrap=True)
    parts = ", ".join(f"{part} {_short(count)}" for part, count in outline["parameters"].items())
    console.print(f"[bold]{_short(sum(outline['parameters'].values()))} parameters[/]: {parts}", highlight=False)
    console.print(f"[bold]Kernels on this machine[/]: {_kernels(outline)}", highlight=False, soft_wrap=True)
    console.print(_ranks_table(outline), _stages_table(outline["stages"]))
    for note in outline["notes"]:
        console.print(f"[bold]Note:[/] {escape(note)}", highlight=False, soft_wrap=True)
    for obstacle in outline["obstacles"]:
        where = " on this machine" if obstacle["of_this_machine"] else ""
        console.print(f"[bold]Will not start{where}:[/] {escape(obstacle['problem'])}", highlight=False, soft_wrap=True)
    console.print(escape(_verdict(outline)), highlight=False, soft_wrap=True)


def _verdict(outline: Outline) -> str:
    """What the obstacles come to, in one line. Their fields alone: the rest stands above. Devices and their memory are not counted:
    the ranks may be spread over machines."""
    nowhere, here = (
        dict.fromkeys(
            found["problem"].split(": ")[0] for found in outline["obstacles"] if found["of_this_machine"] is of_machine
        )
        for of_machine in (False, True)
    )
    if nowhere:
        return f"not sound: it can start nowhere with {', '.join(nowhere)}"
    if here:
        return f"sound, but it cannot start here with {', '.join(here)}"
    peak_gib = max(max(stage["peak_bytes_per_rank"]) for stage in outline["stages"]) / 2**30
    ranks = "1 rank" if outline["world_size"] == 1 else f"{outline['world_size']} ranks"
    return f"sound: it can start here, if there is room for {ranks} (on a GPU up to {peak_gib:.2f} GiB each)"


def _kernels(outline: Outline) -> str:
    kernels, fp8 = outline["kernels"], outline["precision"]["fp8"]
    if "problem" in kernels:
        return f"it cannot run this. {escape(kernels['problem'])}"
    names = {"linear": "linear layers", "norm": "norms", "attention": "attention", "optimizer": "optimizer"}
    names |= {"gradient_accumulation_fusion": "gradient accumulation fusion", "cross_entropy": "cross entropy"}
    return ", ".join(f"{label} {kernels[key]}" for key, label in names.items()) + f"; FP8 {fp8}"


def _ranks_table(outline: Outline) -> Table:
    """One row a pipeline rank: layers of each of its chunks, parameters, and of each stage what is held throughout and at the peak,
    on a GPU (``cost.peak``)."""
    stages = outline["stages"]
    columns = [f"{stage['name']}: state, peak (GiB)" for stage in stages]
    caption = f"peak: on a GPU, with {CONTEXT_BYTES / 2**30:.0f} GiB assumed for CUDA and NCCL, and without the allocator's fragments."
    table = Table(
        "pipeline rank", "layers", "parameters", *columns, title="Each rank", title_justify="left", caption=caption
    )
    for rank, count in enumerate(outline["parameters_per_rank"]):
        layers = "+".join(str(chunks[rank]) for chunks in outline["layers_per_chunk"])
        of_stages = ([stage[f"{what}_bytes_per_rank"][rank] / 2**30 for what in ("state", "peak")] for stage in stages)
        table.add_row(str(rank), layers, _short(count), *(f"{state:.2f}, {peak:.2f}" for state, peak in of_stages))
    return table


def _short(value: float) -> str:
    """Three digits and a prefix: 7.06 G."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:g}"


STAGE_ROWS = {
    "num_steps": "steps",
    "global_batch_size": "samples a step",
    "num_microbatches": "micro-batches a rank",
    "sequence_length": "tokens a sample",
    "uncompressed_sequence_length": "  without VTC",
    "visual_tokens_out": "visual tokens an image",
    "visual_tokens_in": "  without VTC",
    "tokens_per_step": "tokens a step",
}


FLOP_ROWS = {
    "FLOPs a step, dense": "flops_per_step_dense",
    "  with VTC": "flops_per_step_all_layers",
    "  with VTC and LDS, mean": "flops_per_step_mean",
}


def _stages_table(stages: list[Outline]) -> Table:
    table = Table(
        "",
        *(stage["name"] for stage in stages),
        title="Stages (tokens as in the middle of each, FLOPs in the mean)",
        title_justify="left",
    )
    table.add_row("frozen", *(", ".join(stage["freeze"]) or "nothing" for stage in stages))
    if any(stage["bf16_products"] for stage in stages):
        table.add_row("not in FP8", *(", ".join(stage["bf16_products"]) or "nothing" for stage in stages))
    table.add_row("balance between ranks", *(stage["balance"] for stage in stages))
    for key, label in STAGE_ROWS.items():
        table.add_row(label, *(f"{stage[key]:,}" for stage in stages))
    for label, key in FLOP_ROWS.items():
        table.add_row(label, *(_short(stage[key]) for stage in stages))
    return table
