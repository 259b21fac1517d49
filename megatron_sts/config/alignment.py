"""The one rule for the shapes that FP8 and the parallel axes need. Torch-free; data, VTC and pipeline all follow it."""

from __future__ import annotations

import math

from megatron_sts.config.errors import refuse
from megatron_sts.config.precision import PrecisionConfig
from megatron_sts.config.schema import ParallelConfig, StageConfig


def fp8_alignment(fp8: str) -> int:
    """Elements that every dimension of an FP8 operand is a multiple of on each rank; 1 without FP8.

    Transformer Engine asks for rows in multiples of 8 and columns of 16, or both of 32 with mxfp8. A weight gradient's
    columns are the product's rows, hence 16 for both. Emulated operands have the shapes that real ones would.
    """
    return {"off": 1, "mxfp8": 32}.get(fp8, 16)


def sequence_multiple(parallel: ParallelConfig, precision: PrecisionConfig) -> int:
    """Tokens a padded sequence is a multiple of, on all pipeline stages.

    Sequence parallelism gives every tensor rank an equal shard, context parallelism gives every context rank two
    equal pieces (one from either end, to balance causal attention), and FP8 needs every shard aligned.
    """
    context = parallel.context_parallel_size
    shards = context * (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1)
    return shards * math.lcm(2 if context > 1 else 1, fp8_alignment(precision.fp8))


def check_padding(parallel: ParallelConfig, stage: StageConfig, multiple: int) -> None:
    """Refuses context-parallel ranks that would share out more padding than tokens; ``multiple``: ``sequence_multiple``."""
    size, length = parallel.context_parallel_size, stage.batch.sequence_length
    padded = -(-length // multiple) * multiple
    if size > 1 and padded >= 2 * length:
        refuse("parallel.context_parallel_size", size,
               f"rows of stages.{stage.name}.batch.sequence_length={length} would be padded to {padded} tokens, for equal shares",
               "lower it, or raise sequence_length")  # fmt: skip


def sample_multiple(parallel: ParallelConfig) -> int:
    """Tokens that a sample takes a multiple of in a packed row: each context rank gets two equal pieces of every sample."""
    return 2 * parallel.context_parallel_size if parallel.context_parallel_size > 1 else 1


def visual_multiple(precision: PrecisionConfig) -> int:
    """Kept tokens of an image are a multiple of this, or all: they are the projector's rows."""
    return fp8_alignment(precision.fp8)
