"""Context parallelism: which tokens of a row, and which images, this rank computes.

A row is cut into 2 x cp equal pieces; rank r computes piece r and piece 2 cp - 1 - r, in this order. Under a causal mask all
ranks then attend to equally many tokens (arXiv 2407.21783, section 3.3.2), and it is what Transformer Engine's attention expects.
In a packed row each of its segments, runs of equal numbers, is cut so, padding too.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megatron_sts.data.packing import Packing
from megatron_sts.mcore.groups import context_parallel_group, place


def own_tokens(rows: torch.Tensor, dim: int, packing: Packing | None) -> torch.Tensor:
    """This rank's tokens of whole rows, whose tokens lie along ``dim``: 1 / cp of them.

    The gradient of what other ranks compute is zero here: summed over context-parallel ranks, as parameters' are, it is whole.

    Args:
        rows: [b, s] (``dim`` 1) or [s, b, h] (``dim`` 0).
        dim: of the tokens.
        packing: of packed rows, for as many context-parallel ranks as there are; else None.
    """
    here = place()
    if here.cp_size == 1:
        return rows
    if packing is not None:
        assert packing.order is not None
        own = packing.order.chunk(here.cp_size, dim=1)[here.cp_rank]
        if dim == 1:
            return rows.gather(1, own)
        # Row by row: a gather of all would keep an index of 8 bytes for each of their elements.
        return torch.stack(
            [row.index_select(0, places) for row, places in zip(rows.unbind(1), own, strict=True)], dim=1
        )
    pieces = rows.chunk(2 * here.cp_size, dim)
    return torch.cat([pieces[here.cp_rank], pieces[-1 - here.cp_rank]], dim)


def whole_rows(own: torch.Tensor, dim: int) -> torch.Tensor:
    """The inverse of ``own_tokens`` of rows that are not packed: all ranks' tokens in their order, on every rank, without
    gradients; a collective."""
    here = place()
    if here.cp_size == 1:
        return own
    own = own.contiguous()
    parts = [torch.empty_like(own) for _ in range(here.cp_size)]
    dist.all_gather(parts, own, group=context_parallel_group())
    return in_order(torch.cat(parts, dim), here.cp_size, dim)


def own_images(pixels: torch.Tensor) -> torch.Tensor:
    """This rank's images of ``pixels`` [n, 3, h, w]: n / cp of them, rounded up with black ones."""
    here = place()
    if here.cp_size == 1:
        return pixels
    count = -(-len(pixels) // here.cp_size)
    missing = count * here.cp_size - len(pixels)
    padded = torch.cat([pixels, pixels.new_zeros(missing, *pixels.shape[1:])])
    return padded[count * here.cp_rank : count * (here.cp_rank + 1)]


def all_images(own: torch.Tensor, num_images: int) -> torch.Tensor:
    """What each rank made of its ``own_images`` [n / cp, ...] -> [n, ...], on every rank; a collective.

    So is its backward pass, which sums the gradients that the ranks' tokens have for each image.
    """
    if place().cp_size == 1:
        return own
    features: torch.Tensor = gather_from_sequence_parallel_region(own, group=context_parallel_group())
    return features[:num_images]


def gathered(own: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[s / cp, ...] of this rank -> [s, ...] of all ranks of ``group``, rank after rank; a collective.

    So is its backward pass, which sums the gradients that the ranks have for each token.
    """
    ranks_in_turn: torch.Tensor = gather_from_sequence_parallel_region(own, group=group)
    return ranks_in_turn


def in_order(ranks_in_turn: torch.Tensor, num_ranks: int, dim: int) -> torch.Tensor:
    """Rank after rank -> token after token, of rows that are not packed."""
    pieces = ranks_in_turn.chunk(2 * num_ranks, dim)
    return torch.cat([*pieces[::2], *reversed(pieces[1::2])], dim)
