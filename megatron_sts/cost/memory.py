"""Parameters of the whole model and of each rank, and the bytes of their state. Torch-free; knows nothing of activations.

Vision tower, Q-Former, projector and word embedding live on the first pipeline rank, final norm and output head on the last.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from megatron_sts.config.architecture import Part
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.cost.buckets import buckets, num_gradient_ranks, rank_weights
from megatron_sts.cost.weights import (
    before_decoder,
    decoder_layer,
    embedding,
    final_norm,
    head,
    num_elements,
    num_elements_on_rank,
)

GRADIENT_BYTES = 4
"""Gradients are summed in fp32 (``grad_reduce_in_fp32``)."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes that one rank holds throughout a stage. Activations and communication buffers come on top."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    padding_bytes: int
    """Of the distributed optimizer's weight and gradient buffers."""

    @property
    def total_bytes(self) -> int:
        """All of them."""
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes + self.padding_bytes


def parameters(resolved: Resolved) -> dict[Part, int]:
    """Parameters of each part that the model has."""
    model, language = resolved.config.model, resolved.config.model.language
    before = before_decoder(model, resolved.num_vision_layers)
    decoder = (
        embedding(language) + decoder_layer(language) * language.num_layers + final_norm(language) + head(language)
    )
    return {part: num_elements(decoder if part == "language" else before[part]) for part in model.parts}


def parameters_per_rank(resolved: Resolved) -> list[int]:
    """Parameters that one (tensor-parallel) rank of each pipeline stage holds.

    Tied word embeddings are held by the first and the last stage.
    """
    ranks = range(resolved.config.parallel.pipeline_model_parallel_size)
    return [sum(each.num_elements for each in rank_weights(resolved, rank)) for rank in ranks]


def layer_parameters_per_rank(resolved: Resolved) -> int:
    """Parameters of one decoder layer that one tensor-parallel rank holds."""
    tp = resolved.config.parallel.tensor_model_parallel_size
    return num_elements_on_rank(decoder_layer(resolved.config.model.language), tp)


def learning_parts(resolved: Resolved, stage: ResolvedStage) -> Collection[Part]:
    """Those that the model has and that train in the stage."""
    return [part for part in resolved.config.model.parts if part not in stage.config.freeze]


def memory_per_rank(resolved: Resolved, stage: ResolvedStage, *, shard: int = 0) -> list[RankMemory]:
    """Bytes of weights, gradients and optimizer state on a rank of each pipeline stage.

    Gradients and optimizer state exist for parts that train. fp32: 4 bytes a weight, 4 a gradient, 8 of Adam moments.
    bf16: 2 a weight, 4 a gradient (summed in fp32), 12 for Adam moments and fp32 master weights. The distributed
    optimizer deals the last out to data-parallel ranks (Megatron-LM, distributed optimizer: 6 + 12/d bytes), ``shard`` being the
    rank's place among them: padding makes the last one's a little less. Skipped layers free nothing of it. Of weights in FP8 see ``peak.fp8_bytes``.
    """
    is_fp32 = resolved.config.precision.params == "fp32"
    weight_bytes, optimizer_bytes = (4, 8) if is_fp32 else (2, 12)
    is_shared = resolved.config.parallel.use_distributed_optimizer
    shard, num_shards = (shard, num_gradient_ranks(resolved)) if is_shared else (0, 1)
    learning = learning_parts(resolved, stage)
    memory = []
    for rank, held in enumerate(parameters_per_rank(resolved)):
        of_rank = buckets(resolved, rank, learning)
        trained, owned = (sum(bucket.of_shard(*place) for bucket in of_rank) for place in ((0, 1), (shard, num_shards)))
        padding = sum(bucket.num_elements for bucket in of_rank) - trained
        memory.append(
            RankMemory(
                weights_bytes=held * weight_bytes,
                gradients_bytes=trained * GRADIENT_BYTES,
                optimizer_bytes=owned * optimizer_bytes,
                padding_bytes=padding * (GRADIENT_BYTES + weight_bytes),
            )
        )
    return memory
