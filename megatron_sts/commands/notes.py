"""What a config may say and its author may not have meant: notes of a dry run, which keep nothing from starting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import numpy as np

from megatron_sts.config.replicated import without_replicas
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.schema import LdsConfig
from megatron_sts.cost.flops import forward_flops, planned_load, step_flops
from megatron_sts.lds.effective import CHANGING_SAMPLERS, effective_probabilities
from megatron_sts.lds.placement import placement
from megatron_sts.lds.rounds import blocks_are_rounds
from megatron_sts.lds.schedule import skip_probabilities
from megatron_sts.plan.layout import grid

LARGE_CHANGE = 0.25
"""alpha x epsilon of the paper: how far its depth profile moves a layer from the mean at the start."""
LARGE_SCALE = 10.0
"""Times what a layer adds to the residual stream."""


def notes(resolved: Resolved) -> Iterator[str]:
    """One line each."""
    yield from never_saved(resolved)
    yield from without_replicas(resolved)
    for stage in resolved.stages:
        yield from validated(resolved, stage)
        if (lds := stage.config.lds) is not None:
            yield from blocks(resolved, stage, lds)
            yield from rarely_run(resolved, stage, lds)


def never_saved(resolved: Resolved) -> Iterator[str]:
    """Numbers of steps after which nothing is saved, because no stage is so long."""
    checkpoint, longest = resolved.config.checkpoint, max(stage.num_steps for stage in resolved.stages)
    for name in ("interval_steps", "keep_every_steps"):
        if (value := getattr(checkpoint, name)) is not None and value > longest:
            what = "only the ends of stages are saved" if name == "interval_steps" else "it keeps nothing"
            yield f"checkpoint.{name}={value}: no stage has more than {longest} steps, so that {what}"


def validated(resolved: Resolved, stage: ResolvedStage) -> Iterator[str]:
    """How often a stage is validated, and what that costs beside its training: forward passes of rows that are full."""
    settings, held_out = stage.config.validation, stage.held_out
    if settings is None or held_out is None:
        return
    model, load = resolved.config.model, planned_load(resolved, stage, stage.uncompressed)
    passes = forward_flops(model, load, num_vision_layers=resolved.num_vision_layers)
    runs = {"decoder_layer": model.language.num_layers}
    forward = sum(getattr(passes, piece.name).forward * runs.get(piece.name, 1) for piece in fields(passes))
    training = step_flops(resolved, stage, load, layers_executed=model.language.num_layers)
    number, samples = -(-stage.num_steps // settings.interval_steps), held_out.num_samples
    share = number * samples / stage.config.batch.global_batch_size * forward / (stage.num_steps * training)
    yield (
        f"stages.{stage.name}.validation: {number:,} times {samples:,} samples, about {share:.1%} of what the stage takes dense"
    )


def blocks(resolved: Resolved, stage: ResolvedStage, lds: LdsConfig) -> Iterator[str]:
    """Blocks of layers that no schedule can leave out."""
    pp, layout = resolved.config.parallel.pipeline_model_parallel_size, resolved.layers_per_chunk
    if pp == 1 or lds.sampler != "rounds" or lds.rounds == "layout" or blocks_are_rounds(lds.rounds, layout):
        return
    yield (
        f"stages.{stage.name}.lds.rounds={lds.rounds}: blocks of layers that are no whole rounds of this layout's "
        f"{len(layout)}: ranks will wait for each other's layers; set it to layout"
    )


def rarely_run(resolved: Resolved, stage: ResolvedStage, lds: LdsConfig) -> Iterator[str]:
    """Layers that a sampler skips far more often than the schedule says, or that count for many when they run."""
    place, steps = placement(resolved, stage), sorted({0, *grid(stage.num_steps)})
    drawn = np.array([effective_probabilities(lds, step, stage.num_steps, place) for step in steps])
    written = np.array([skip_probabilities(lds, step, stage.num_steps, place.num_layers) for step in steps])
    change = np.abs(drawn - written)
    at, layer = np.unravel_index(np.argmax(change), change.shape)
    if lds.sampler in CHANGING_SAMPLERS and change[at, layer] > LARGE_CHANGE:
        remedy = "more chunks a rank or head_yields=off" if lds.sampler == "rounds" else "another layout"
        yield (
            f"stages.{stage.name}.lds.sampler={lds.sampler}: skips layer {layer} with probability {drawn[at, layer]:.2f} in "
            f"step {steps[at]}, where the schedule has {written[at, layer]:.2f}; {remedy} changes less"
        )
    scale = 1 / np.maximum(1 - drawn, 1e-9)
    at, layer = np.unravel_index(np.argmax(np.where(drawn < 1, scale, 0)), scale.shape)
    if lds.residual_scale == "inverse_keep" and scale[at, layer] > LARGE_SCALE:
        yield (
            f"stages.{stage.name}.lds.residual_scale=inverse_keep: multiplies what layer {layer} adds by {scale[at, layer]:.3g} "
            f"when it runs in step {steps[at]}; lower alpha, or set it to none"
        )
