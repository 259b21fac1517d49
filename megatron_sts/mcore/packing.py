"""How attention stays within the samples that share a row."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sts.data.packing import Packing
from megatron_sts.mcore.groups import place


def attention_within(packing: Packing | None, config: TransformerConfig) -> dict[str, Any]:
    """What ``GPTModel`` is called with so that tokens attend within their segment; without packing to their whole row.

    Transformer Engine takes the ends of the segments and computes nothing between them; torch's attention gets a mask.
    """
    if packing is None:
        return {"attention_mask": None}
    if config.transformer_impl == "transformer_engine":
        return {"attention_mask": None, "packed_seq_params": packed_seq_params(packing)}
    here = place()
    return {"attention_mask": hidden_pairs(packing, here.cp_rank, here.cp_size)}


def hidden_pairs(packing: Packing, cp_rank: int = 0, cp_size: int = 1) -> torch.Tensor:
    """True where a query of this context-parallel rank may not see a key of any, bool [b, 1, s / cp, s].

    Keys are in the order of the row, or those of rank after rank where there are several.
    """
    segments, keys = packing.segments, packing.order
    if keys is None:
        length = segments.shape[1]
        is_later = torch.ones(length, length, dtype=torch.bool, device=segments.device).triu(1)
        return (is_later | (segments[:, :, None] != segments[:, None, :])).unsqueeze(1)
    of_keys = segments.gather(1, keys)
    queries, of_queries = keys.chunk(cp_size, dim=1)[cp_rank], of_keys.chunk(cp_size, dim=1)[cp_rank]
    is_later = keys[:, None, :] > queries[:, :, None]
    return (is_later | (of_queries[:, :, None] != of_keys[:, None, :])).unsqueeze(1)


def packed_seq_params(packing: Packing) -> PackedSeqParams:
    """One row's segments for Transformer Engine's THD attention.

    Padding is a segment like another, or the end of one: what it computes carries no loss. Over context-parallel ranks the ends
    are those of the whole row too, which Transformer Engine divides; it then asks for ends with padding beside those without.
    """
    assert len(packing.segments) == 1
    with_padding = None if packing.order is None else packing.starts
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=packing.starts,
        cu_seqlens_kv=packing.starts,
        cu_seqlens_q_padded=with_padding,
        cu_seqlens_kv_padded=with_padding,
        max_seqlen_q=packing.longest,
        max_seqlen_kv=packing.longest,
        total_tokens=packing.segments.shape[1],
    )
