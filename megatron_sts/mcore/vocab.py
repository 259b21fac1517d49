"""What is asked of logits whose vocabulary is spread over tensor-parallel ranks."""

from __future__ import annotations

import torch
from torch import distributed as dist

from megatron_sts.mcore.groups import place, tensor_parallel_group


def vocab_parallel_argmax(logits: torch.Tensor) -> torch.Tensor:
    """``logits`` [..., vocab / tp] of this rank -> int64 [...]: the token with the largest logit over all ranks.

    The same on every tensor-parallel rank; among equals the smallest token wins. Two small all-reduces, no gather of logits.
    """
    largest, local = logits.float().max(dim=-1)
    here, shard_size = place(), logits.shape[-1]
    token = local + here.tp_rank * shard_size
    if here.tp_size == 1:
        return token
    overall = largest.clone()
    dist.all_reduce(overall, op=dist.ReduceOp.MAX, group=tensor_parallel_group())
    token = torch.where(largest == overall, token, here.tp_size * shard_size)
    dist.all_reduce(token, op=dist.ReduceOp.MIN, group=tensor_parallel_group())
    return token
