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


def hide_ids_from(logits: torch.Tensor, num_ids: int) -> torch.Tensor:
    """The same logits [..., vocab / tp], but tokens from ``num_ids`` on get no share."""
    shard_size = logits.shape[-1]
    tokens = torch.arange(shard_size, device=logits.device) + place().tp_rank * shard_size
    return logits.masked_fill(tokens >= num_ids, -torch.inf)


def whole_vocabulary(logits: torch.Tensor) -> torch.Tensor:
    """``logits`` [..., vocab / tp] of this rank -> [..., vocab], the same on every tensor-parallel rank."""
    here = place()
    if here.tp_size == 1:
        return logits
    shards = [torch.empty_like(logits) for _ in range(here.tp_size)]
    dist.all_gather(shards, logits.contiguous(), group=tensor_parallel_group())
    return torch.cat(shards, dim=-1)
