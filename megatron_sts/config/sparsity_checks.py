"""Refusals of VTC's and LDS's settings: what reads nothing, contradicts another or leaves nothing to skip. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

from megatron_sts.config.architecture import ModelConfig
from megatron_sts.config.errors import refuse
from megatron_sts.config.schema import LdsConfig, StageConfig
from megatron_sts.config.tile_checks import check_kept_tiles
from megatron_sts.config.tokens import kept_tokens, least_keep_ratio


def check_sparsity(stage: StageConfig, model: ModelConfig) -> None:
    """Everything that can be refused without the number of ranks; ``check_rounds`` is the rest."""
    check_compressed(stage, model)
    check_keeping(stage)
    check_kept_tiles(stage, model)
    check_skipping(stage, model.language.num_layers)


def check_compressed(stage: StageConfig, model: ModelConfig) -> None:
    """VTC has tokens to compress, in a form that its sampler takes."""
    if stage.vtc is not None and model.vision is None:
        refuse(
            f"stages.{stage.name}.vtc",
            f"{{keep_ratio: {stage.vtc.keep_ratio:g}}}",
            "model.vision is null, so there are no visual tokens",
            "set it to null",
        )
    if stage.vtc is not None and model.qformer is not None and stage.vtc.sampler in ("anchored", "pooled"):
        refuse(f"stages.{stage.name}.vtc.sampler", stage.vtc.sampler, "a Q-Former's tokens form no grid",
               "use uniform, random or guided")  # fmt: skip


def check_keeping(stage: StageConfig) -> None:
    """VTC settings are read by the schedule that is chosen, and do not contradict each other."""
    if stage.vtc is None:
        return
    vtc, field = stage.vtc, f"stages.{stage.name}.vtc"
    moves = vtc.schedule in ("linear", "cosine")
    if moves != (vtc.final_keep_ratio is not None):
        refuse(
            f"{field}.final_keep_ratio",
            "null" if vtc.final_keep_ratio is None else vtc.final_keep_ratio,
            f"schedule={vtc.schedule} {'ends there' if moves else 'reads none'}",
            "give it with schedule=linear or cosine, and only there",
        )
    check_points(f"{field}.schedule_points", vtc.schedule, vtc.schedule_points)
    if vtc.keep_ratio_by_image and vtc.schedule != "constant":
        refuse(f"{field}.keep_ratio_by_image", list(vtc.keep_ratio_by_image), f"schedule={vtc.schedule} moves keep_ratio",
               "set schedule=constant or remove it")  # fmt: skip
    if vtc.full_every is not None and vtc.full_fraction:
        refuse(f"{field}.full_fraction", vtc.full_fraction, f"full_every={vtc.full_every} says which steps already",
               "set one of the two")  # fmt: skip


def check_kept(stage: StageConfig, tokens_in: int, multiple: int) -> None:
    """Every step keeps something of every image."""
    if stage.vtc is None:
        return
    if stage.vtc.sampler == "pooled" and math.isqrt(tokens_in) ** 2 != tokens_in:
        refuse(f"stages.{stage.name}.vtc.sampler", "pooled", f"an image's {tokens_in} tokens form no square grid",
               "use another sampler")  # fmt: skip
    if kept_tokens(stage.vtc, least := least_keep_ratio(stage.vtc), tokens_in, multiple) == 0:
        refuse(
            f"stages.{stage.name}.vtc.keep_ratio",
            least,
            f"keeps none of an image's {tokens_in} tokens",
            f"use at least {1 / tokens_in:.3g}",
        )


def check_points(field: str, schedule: str, points: tuple[tuple[float, float], ...]) -> None:
    """A piecewise schedule has points, in order, and no other schedule has any."""
    written = f"[{', '.join(f'[{x:g}, {y:g}]' for x, y in points)}]"
    if (schedule == "piecewise") != bool(points):
        refuse(
            field,
            written,
            f"schedule={schedule} {'needs points' if schedule == 'piecewise' else 'reads none'}",
            "give points with schedule=piecewise, and only there",
        )
    if any(later <= x for (x, _), (later, _) in pairwise(points)):
        refuse(field, written, "x does not rise from point to point", "sort them, each x once")


def check_skipping(stage: StageConfig, num_layers: int) -> None:
    """LDS settings are read by the schedule, profile or sampler that is chosen, and leave it something to skip."""
    if stage.lds is None:
        return
    lds, field = stage.lds, f"stages.{stage.name}.lds"
    for layer in lds.fixed_layers:
        if not 0 <= layer < num_layers:
            refuse(f"{field}.fixed_layers", layer, f"the language model has {num_layers} layers",
                   f"use 0 to {num_layers - 1}")  # fmt: skip
    check_points(f"{field}.schedule_points", lds.schedule, lds.schedule_points)
    for name in ("protect_first", "protect_last"):
        if lds.depth_profile != "protect" and (value := getattr(lds, name)):
            refuse(f"{field}.{name}", value, f"depth_profile={lds.depth_profile} protects none", "set it to 0")
    if lds.depth_profile == "protect" and lds.protect_first + lds.protect_last >= num_layers:
        refuse(
            f"{field}.protect_first",
            lds.protect_first,
            f"with protect_last={lds.protect_last} it leaves none of the language model's {num_layers} layers to skip",
            "lower either",
        )
    if lds.fixed_layers and lds.sampler != "fixed":
        refuse(
            f"{field}.fixed_layers",
            f"[{', '.join(map(str, lds.fixed_layers))}]",
            f"sampler={lds.sampler} draws the layers",
            "set sampler=fixed or remove them",
        )
    check_rounds_fields(field, lds, num_layers)
    if lds.residual_scale != "none" and lds.sampler == "fixed":
        refuse(
            f"{field}.residual_scale",
            lds.residual_scale,
            "sampler=fixed always runs the same layers, so there is no probability to make up for",
            "set it to none",
        )


def check_rounds_fields(field: str, lds: LdsConfig, num_layers: int) -> None:
    """``rounds`` alone reads its fields; it skips in whole steps, blocks of equal size."""
    if lds.sampler != "rounds":
        for name in ("rounds", "head_yields"):
            if (value := getattr(lds, name)) != LdsConfig.model_fields[name].default:
                refuse(f"{field}.{name}", value, f"sampler={lds.sampler} reads none", "set sampler=rounds or remove it")
        return
    if lds.granularity == "microbatch":
        refuse(f"{field}.granularity", "microbatch", "sampler=rounds leaves whole rounds out of a step's schedule",
               "set it to step, or sampler to balanced")  # fmt: skip
    if lds.rounds == 1:
        refuse(f"{field}.rounds", 1, "one block has all layers, of which a step would skip all or none",
               "use layout or a larger divisor of the number of layers")  # fmt: skip
    if lds.rounds != "layout" and num_layers % lds.rounds:
        refuse(f"{field}.rounds", lds.rounds, f"does not divide the language model's {num_layers} layers",
               "use layout or a divisor")  # fmt: skip


def check_rounds(stage: StageConfig, layers_per_chunk: Sequence[Sequence[int]]) -> None:
    """``sampler: rounds`` has rounds to skip: more than one with layers, and one of them without a protected layer."""
    lds, field = stage.lds, f"stages.{stage.name}.lds"
    if lds is None or lds.sampler != "rounds":
        return
    num_layers = sum(map(sum, layers_per_chunk))
    of_rounds = [sum(counts) for counts in layers_per_chunk]
    if lds.rounds == "layout" and sum(map(bool, of_rounds)) == 1:
        why = "a pipeline rank has one chunk" if len(of_rounds) == 1 else "one chunk a pipeline rank has all layers"
        refuse(f"{field}.rounds", "layout", f"{why}, so there is one round and nothing to drop",
               "set parallel.layout=auto or virtual_pipeline_model_parallel_size, or lds.sampler=balanced")  # fmt: skip
    if lds.depth_profile != "protect":
        return
    ends = list(accumulate(of_rounds if lds.rounds == "layout" else [num_layers // lds.rounds] * lds.rounds))
    first, last = lds.protect_first, num_layers - lds.protect_last
    if not any(first <= start < end <= last for start, end in pairwise([0, *ends])):
        refuse(f"{field}.protect_first", first, f"with protect_last={lds.protect_last} every round has a protected layer, "
               "and so none can be skipped", "lower either, or have more rounds")  # fmt: skip
