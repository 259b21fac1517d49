"""The distributed optimizer's state in a checkpoint, written by each data-parallel rank as it holds it.

megatron-core's ``fully_reshardable`` format stores master weights and moments in the shapes of the model's weights, so that
any layout can load them; to write it, megatron-core gathers all of them on every data-parallel rank first. But a rank's shard
of a weight is a range of its elements, and a range is a few boxes of the weight: the format takes those as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer


@dataclass(frozen=True)
class Box:
    """An axis-aligned part of a tensor whose elements follow each other in memory."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


def boxes(shape: Sequence[int], start: int, end: int) -> Iterator[Box]:
    """The elements from ``start`` to ``end`` of a row-major tensor as boxes, in order: at most 2 n - 1 of n axes."""
    if start >= end:
        return
    if len(shape) <= 1:
        yield Box((start,), (end - start,)) if shape else Box((), ())
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # whole rows
    if first > last:  # within one
        yield from _of_row(shape, last, start - last * row, end - last * row)
        return
    yield from _of_row(shape, first - 1, start - (first - 1) * row, row if start < first * row else 0)
    if first < last:
        yield Box((first, *(0 for _ in shape[1:])), (last - first, *shape[1:]))
    yield from _of_row(shape, last, 0, end - last * row)


def _of_row(shape: Sequence[int], row: int, start: int, end: int) -> Iterator[Box]:
    for box in boxes(shape[1:], start, end):
        yield Box((row, *box.offset), (1, *box.shape))


def sharded_param_state(optimizer: DistributedOptimizer, model_state: dict[str, Any]) -> Iterator[ShardedTensor]:
    """This rank's master weights and moments, under the names and places that ``fully_reshardable`` has; no collective.

    ``model_state`` is the sharded state of the model, whose weights the optimizer moves. The tensors are views of the state.
    """
    described, _ = extract_sharded_tensors_and_factories(model_state)
    weights = {weight.data: weight for weight in nested_values(described)}
    buckets = (bucket for buffer in optimizer.gbuf_ranges for of_type in buffer.values() for bucket in of_type)
    for bucket in buckets:
        for weight, ranges in bucket["param_map"].items():
            for name, state in optimizer._get_main_param_and_optimizer_states(weight).items():
                if name != "step":  # Adam's, one for all: among what is common
                    yield from _pieces(weights[weight], name, state, ranges["param"].start)


def _pieces(
    weight: ShardedTensor | ShardedTensorFactory, name: str, state: torch.Tensor, start: int
) -> Iterator[ShardedTensor]:
    """``state`` [n] belongs to the elements of this rank's ``weight`` from ``start`` on."""
    whole = torch.empty(weight.data.shape, dtype=state.dtype, device="meta")
    options: dict[str, Any] = {"key": f"optimizer.state.{name}.{weight.key}", "data": whole}
    options["replica_id"] = (*weight.replica_id[:2], 0)  # of the data-parallel ranks each has its own
    if isinstance(weight, ShardedTensorFactory):
        parts = list(nested_values(replace(weight, **options).build()))  # a gate and its value, say
    else:
        parts = [replace(weight, **options, dtype=state.dtype)]
    for part in parts:
        assert part.data.is_contiguous(), f"{part.key}: rows are split"
        before = part.data.storage_offset()
        at = max(start - before, 0)
        for box in boxes(part.local_shape, at, min(start + state.numel() - before, part.data.numel())):
            yield _piece(part, box, state[before + at - start :])
            at += math.prod(box.shape)


def _piece(part: ShardedTensor, box: Box, state: torch.Tensor) -> ShardedTensor:
    """``state`` begins with the elements of the box. Axes that stand before the tensor's own (the number of a layer, in stacked
    ones) become its own: megatron-core hands irregular pieces to torch without them."""
    shape = (1,) * part.prepend_axis_num + box.shape
    inner = (0,) * part.prepend_axis_num + box.offset
    offset = tuple(a + b for a, b in zip(part.global_offset, inner, strict=True))
    data = state[: math.prod(shape)].view(shape)
    return replace(
        part, data=data, local_shape=shape, global_offset=offset, prepend_axis_num=0, axis_fragmentations=None
    )
