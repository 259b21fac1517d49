"""Which weights a rank holds and how its gradient buffers lay them out. Torch-free; knows nothing of what runs in a step.

The layout is that of ``mcore/buckets.py``: in backward order, a bucket a decoder layer, and outside the layers one a part of the
model and side of the layers. With the distributed optimizer a parameter begins at a multiple of 64 elements and a bucket ends
at one of lcm(ranks, 128) (megatron-core, ``optimizer/param_layout.py``), so that data-parallel ranks get equal shards.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from megatron_sts.config.architecture import Part
from megatron_sts.config.resolve import Resolved
from megatron_sts.cost.weights import Weights, before_decoder, decoder_layer, embedding, final_norm, head

PARAMETER_MULTIPLE, BUCKET_MULTIPLE = 64, 128


@dataclass(frozen=True)
class Held:
    """One parameter on a rank."""

    part: Part
    layer: int | None
    """0-based decoder layer; None outside of them."""
    num_elements: int
    is_split: bool
    """Whether tensor-parallel ranks share it out."""
    is_shared: bool = False
    """A word embedding that the first and the last pipeline stage both hold."""


@dataclass(frozen=True)
class Bucket:
    """Gradients that are reduced together."""

    layer: int | None
    parameters: tuple[tuple[int, int], ...]
    """[start, end) of each, in elements from the bucket's start."""
    num_elements: int
    """Padding included."""

    def of_shard(self, shard: int, num_shards: int) -> int:
        """Elements of parameters, padding left out, in one of ``num_shards`` equal shards."""
        size = self.num_elements // num_shards
        start, end = shard * size, (shard + 1) * size
        return sum(max(0, min(last, end) - max(first, start)) for first, last in self.parameters)


def chunk_weights(resolved: Resolved, rank: int, chunk: int) -> list[Held]:
    """What chunk ``chunk`` of pipeline rank ``rank`` holds on each tensor-parallel rank, in megatron-core's order."""
    config, layout = resolved.config, resolved.layers_per_chunk
    language, tp = config.model.language, config.parallel.tensor_model_parallel_size
    is_first = rank == chunk == 0
    is_last = chunk == len(layout) - 1 and rank == len(layout[0]) - 1
    is_shared = language.tie_word_embeddings and len(layout[0]) > 1

    def held(part: Part, weights: Weights, layer: int | None = None, *, shared: bool = False) -> list[Held]:
        if part == "vision" and resolved.spreads_vision:  # whole on each rank
            return [Held(part, layer, weight.num_elements, is_split=False) for weight in weights]
        return [Held(part, layer, weight.on_rank(tp), weight.is_split, shared) for weight in weights]

    first = sum(map(sum, layout[:chunk])) + sum(layout[chunk][:rank])
    found = held("language", embedding(language), shared=is_shared) if is_first else []
    for layer in range(first, first + layout[chunk][rank]):
        found += held("language", decoder_layer(language), layer)
    if is_last:
        found += held("language", final_norm(language)) + held("language", head(language))
        found += held("language", embedding(language), shared=True) if is_shared else []
    for part, weights in before_decoder(config.model, resolved.num_vision_layers).items():
        if is_first or (part == "vision" and resolved.spreads_vision and chunk == 0):
            found += held(part, weights)
    return found


def rank_weights(resolved: Resolved, rank: int) -> list[Held]:
    """Of all chunks of a pipeline rank."""
    return [each for chunk in range(len(resolved.layers_per_chunk)) for each in chunk_weights(resolved, rank, chunk)]


def buckets(resolved: Resolved, rank: int, learning: Collection[Part]) -> list[Bucket]:
    """Gradient buckets of pipeline rank ``rank`` when ``learning`` parts train, chunk by chunk, each in backward order."""
    is_padded = resolved.config.parallel.use_distributed_optimizer
    num_shards = num_gradient_ranks(resolved) if is_padded else None
    found = []
    for chunk in range(len(resolved.layers_per_chunk)):
        trained = [each for each in chunk_weights(resolved, rank, chunk) if each.part in learning]
        found += list(_buckets(trained[::-1], num_shards))
    return found


def num_gradient_ranks(resolved: Resolved) -> int:
    """Ranks that sum their gradients and share optimizer state: data-parallel ones, and with context parallelism those too."""
    return resolved.data_parallel_size * resolved.config.parallel.context_parallel_size


def _buckets(parameters: Sequence[Held], num_shards: int | None) -> Iterator[Bucket]:
    """``num_shards`` None: no padding."""
    by_bucket = groupby(enumerate(parameters), key=lambda each: _bucket_of(*each))
    for (_, layer, _), group in by_bucket:
        places, end = [], 0
        for _, parameter in group:
            start = end if num_shards is None else _round_up(end, PARAMETER_MULTIPLE)
            end = start + parameter.num_elements
            places.append((start, end))
        size = end if num_shards is None else _round_up(end, math.lcm(num_shards, BUCKET_MULTIPLE))
        yield Bucket(layer, tuple(places), size)


def _bucket_of(number: int, parameter: Held) -> tuple[Part, int | None, int | None]:
    """Neighbours with the same go into one bucket; a shared embedding is alone in its own."""
    return parameter.part, parameter.layer, number if parameter.is_shared else None


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
