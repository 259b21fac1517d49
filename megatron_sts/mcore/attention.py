"""torch's attention as megatron-core's core attention, also over tokens that context-parallel ranks share out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sts.mcore.context import gathered, in_order


class SdpaCoreAttention(torch.nn.Module):
    """torch's ``scaled_dot_product_attention`` as megatron-core's core attention."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        softmax_scale: float | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__()
        self.dropout = config.attention_dropout
        self.softmax_scale = softmax_scale
        self.is_causal = attn_mask_type == AttnMaskType.causal

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_unused: Any,
    ) -> torch.Tensor:
        """``query`` [s, b, n, d], ``key``/``value`` [s, b, groups, d] -> [s, b, n * d]. A mask is True where hidden."""
        sequence, batch, heads, _ = query.shape
        attended = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=None if attention_mask is None else attention_mask.logical_not(),
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.is_causal and attention_mask is None,
            scale=self.softmax_scale,
            enable_gqa=key.shape[2] != heads,
        )
        return attended.permute(2, 0, 1, 3).reshape(sequence, batch, -1)


class AllGatherAttention(SdpaCoreAttention):
    """Causal ``SdpaCoreAttention`` of a rank's own queries to the keys and values of all context-parallel ranks.

    These are gathered, and their gradients summed and scattered, in one collective a pass (arXiv 2407.21783, section 3.3.2).
    Exact. They stay for the backward pass: activations of 1 / cp of the tokens, but keys and values of all, unless recomputed.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        softmax_scale: float | None = None,
        *,
        pg_collection: ProcessGroupCollection,
        **_unused: Any,
    ) -> None:
        super().__init__(config, layer_number, attn_mask_type, softmax_scale)
        if not self.is_causal:
            raise ValueError(f"attention over context-parallel ranks is causal here, not {attn_mask_type.name}")
        self.cp_group = pg_collection.cp
        """The ranks over whose tokens it attends."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        **_unused: Any,
    ) -> torch.Tensor:
        """``query`` [s / cp, b, n, d], ``key``/``value`` [s / cp, b, groups, d] of this rank -> [s / cp, b, n * d].

        Without a mask rows are not packed. One is bool [b, 1, s / cp, s], True where hidden, its keys those of rank after rank.
        """
        both = gathered(torch.cat([key, value], dim=2), self.cp_group)
        if attention_mask is None:
            both = in_order(both, self.cp_group.size(), dim=0)
        keys, values = both.chunk(2, dim=2)
        if attention_mask is not None:
            return super().forward(query, keys, values, attention_mask)
        rank, num_pieces, length = self.cp_group.rank(), 2 * self.cp_group.size(), len(query) // 2
        attended = []
        for queries, piece in zip(query.chunk(2), (rank, num_pieces - 1 - rank), strict=True):
            end = (piece + 1) * length
            is_later = torch.ones(length, end, dtype=torch.bool, device=query.device).triu(end - length + 1)
            attended.append(super().forward(queries, keys[:end], values[:end], is_later))
        return torch.cat(attended)


def check_spans_context(attention: torch.nn.Module, config: TransformerConfig) -> None:
    """Refuses a core attention that would attend to its own rank's tokens alone, which nothing else would notice.

    One that spans context-parallel ranks declares it by ``cp_group``, as Transformer Engine's does: the ranks that it spans.

    Raises:
        ValueError: it spans fewer.
    """
    group = getattr(attention, "cp_group", None)
    num_spanned = 1 if group is None else group.size()
    if num_spanned != config.context_parallel_size:
        raise ValueError(
            f"{type(attention).__name__} attends over the tokens of {num_spanned} ranks, but a row lies on "
            f"context_parallel_size={config.context_parallel_size}: its cp_group must say that it spans them"
        )
