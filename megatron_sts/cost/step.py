"""What a training step runs, as far as its bytes depend on it: shapes, and which layers run how often. Torch-free.

A pure number: whoever draws masks (``lds``) or plans (``plan``) says it, ``cost`` only counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.tokens import TokenCounts
from megatron_sts.cost.flops import TokenLoad, planned_load


@dataclass(frozen=True)
class StepShape:
    """One step of a stage, or several in the mean."""

    counts: TokenCounts
    """Tokens of a row, and kept ones of each image."""
    layer_runs: tuple[float, ...]
    """[layers]: micro-batches of one data-parallel rank that run the decoder layer."""
    layer_active: tuple[float, ...]
    """[layers]: share of the steps in which any micro-batch runs it."""
    num_units: float
    """What the schedule runs as chunks of each pipeline rank (``pass_order.grouped``)."""


def dense_step(resolved: Resolved, stage: ResolvedStage, counts: TokenCounts | None = None) -> StepShape:
    """A step that skips no layer; ``counts`` None: the stage's longest rows, which need most memory."""
    num_layers = resolved.config.model.language.num_layers
    runs = (float(stage.num_microbatches),) * num_layers
    return StepShape(counts or longest(stage), runs, (1.0,) * num_layers, len(resolved.layers_per_chunk))


def longest(stage: ResolvedStage) -> TokenCounts:
    """The shape of the stage's steps with the longest rows and, among these, the most visual tokens."""
    shapes = {stage.tokens(step) for step in range(stage.num_steps)} if stage.config.vtc else {stage.uncompressed}
    return max(shapes, key=lambda counts: (counts.sequence_length, sum(counts.visual_tokens_out)))


def microbatch_load(resolved: Resolved, stage: ResolvedStage, counts: TokenCounts) -> TokenLoad:
    """One micro-batch of full rows, with as many images as the stage can hold."""
    whole, batch = planned_load(resolved, stage, counts), stage.config.batch
    share = batch.global_batch_size // batch.micro_batch_size
    return TokenLoad(
        num_tokens=whole.num_tokens // share,
        num_pairs=whole.num_pairs // share,
        num_images=whole.num_images // share,
        num_visual_tokens=whole.num_visual_tokens // share,
        num_projected_tokens=whole.num_projected_tokens // share,
    )
