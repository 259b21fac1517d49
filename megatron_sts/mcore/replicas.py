"""What of this rank's model other ranks hold too, bit for bit, and a checksum that tells whether they still do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.fp8_utils import is_float8tensor

from megatron_sts.mcore.buckets import LayerDataParallel
from megatron_sts.mcore.groups import place
from megatron_sts.mcore.optim import StageOptimizer
from megatron_sts.mcore.weights import named_weights, split_dim

WEIGHT, MASTER, GRADIENT = "weight", "master weight", "gradient"
KINDS = (WEIGHT, MASTER, GRADIENT)
"""In the order in which one may have made the others differ."""
NOT_NOW = -(2**63)
"""In place of a checksum: the tensor is not whole at the moment."""
_WORD_BYTES = 8


@dataclass(frozen=True)
class Copy:
    """A tensor that ranks with the same ``kind`` and ``name`` must hold alike."""

    kind: str
    """Of ``KINDS``."""
    name: str
    """Layout-free, with the tensor-parallel rank of a shard."""
    layer: int | None
    """Of the decoder."""
    tensor: torch.Tensor
    parameter: torch.nn.Parameter

    @property
    def key(self) -> str:
        """Names it among all ranks."""
        return f"{self.kind} {self.name}"


def copies(chunks: Sequence[LayerDataParallel], optimizer: StageOptimizer) -> Iterator[Copy]:
    """All of them on this rank: data- and context-parallel ranks hold the same weights, tensor-parallel ranks those that
    are not split, first and last stage a tied embedding.

    So it is with gradients, once reduced, and fp32 masters, without the distributed optimizer: with it every rank has a shard
    of its own of either, and what is gathered are weights. What is stored in FP8 is left out.
    """
    masters = {model: updated for model, updated in optimizer.inner_params() if model is not updated}
    for name, parameter in named_weights(chunks):
        if is_float8tensor(parameter):
            continue
        shard = name if split_dim(parameter) is None else f"{name}, tensor-parallel shard {place().tp_rank}"
        tensors = {WEIGHT: parameter.data}
        if parameter.requires_grad and not chunks[0].ddp_config.use_distributed_optimizer:
            tensors[GRADIENT] = parameter.main_grad  # type: ignore[attr-defined]
            if parameter in masters:
                tensors[MASTER] = masters[parameter].data
        for kind, tensor in tensors.items():
            yield Copy(kind, shard, getattr(parameter, "decoder_layer", None), tensor, parameter)


def checksums(chunks: Sequence[LayerDataParallel], found: Sequence[Copy]) -> torch.Tensor:
    """int64 [copies]: ``checksum`` of each, ``NOT_NOW`` for weights that are yet to be gathered. No synchronisation with the device."""
    device = found[0].tensor.device
    moving = {p for chunk in chunks for group in chunk.bucket_groups if not group.is_whole for p in group.params}
    now = [
        torch.tensor(NOT_NOW, device=device)
        if copy.kind == WEIGHT and copy.parameter in moving
        else checksum(copy.tensor)
        for copy in found
    ]
    return torch.stack(now)


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """int64 []: the sum, modulo 2^64, of a contiguous tensor's bits as words of 64. One flipped bit always changes it.

    In integers: the order of a sum decides nothing, so that devices and numbers of threads do not. Words, as they are summed 30
    times as fast on a CPU as single elements are.
    """
    flat = tensor.reshape(-1)
    size = _WORD_BYTES // flat.element_size()
    if flat.storage_offset() % size:
        flat = flat.clone()  # words begin with the tensor, wherever in a buffer it lies
    whole = flat.numel() // size * size
    total = flat[:whole].view(torch.int64).sum()
    if whole < flat.numel():
        total = (
            total + torch.nn.functional.pad(flat[whole:], (0, size - (flat.numel() - whole))).view(torch.int64).sum()
        )
    return total
