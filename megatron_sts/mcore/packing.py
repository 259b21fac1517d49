"""How attention stays within the samples that share a row."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sts.mcore.context import rank_after_rank
from megatron_sts.mcore.groups import place


def attention_within(segments: torch.Tensor | None, config: TransformerConfig) -> dict[str, Any]:
    """What ``GPTModel`` is called with so that tokens attend within their segment, ``segments`` [b, s] of whole rows or None.

    Transformer Engine takes the ends of the segments and computes nothing between them; torch's attention gets a mask.
    """
    if segments is None:
        return {"attention_mask": None}
    here = place()
    if config.transformer_impl == "transformer_engine":
        return {"attention_mask": None, "packed_seq_params": packed_seq_params(segments, here.cp_size)}
    return {"attention_mask": hidden_pairs(segments, here.cp_rank, here.cp_size)}


def hidden_pairs(segments: torch.Tensor, cp_rank: int = 0, cp_size: int = 1) -> torch.Tensor:
    """True where a query of this context-parallel rank may not see a key of any, bool [b, 1, s / cp, s].

    ``segments`` int [b, s] of whole rows. Keys are in the order of the row, or those of rank after rank where there are several.
    """
    if cp_size == 1:
        length = segments.shape[1]
        is_later = torch.ones(length, length, dtype=torch.bool, device=segments.device).triu(1)
        return (is_later | (segments[:, :, None] != segments[:, None, :])).unsqueeze(1)
    keys = rank_after_rank(segments, cp_size)
    of_keys = segments.gather(1, keys)
    queries, of_queries = keys.chunk(cp_size, dim=1)[cp_rank], of_keys.chunk(cp_size, dim=1)[cp_rank]
    is_later = keys[:, None, :] > queries[:, :, None]
    return (is_later | (of_queries[:, :, None] != of_keys[:, None, :])).unsqueeze(1)


def packed_seq_params(segments: torch.Tensor, cp_size: int = 1) -> PackedSeqParams:
    """One row's segments, each a run of equal numbers, for Transformer Engine's THD attention. ``segments`` int [1, s].

    Padding is a segment like another, or the end of one: what it computes carries no loss. Over context-parallel ranks the ends
    are those of the whole row too, which Transformer Engine divides; it then asks for ends with padding beside those without.
    """
    [row] = segments
    starts = torch.nn.functional.pad(row[1:] != row[:-1], (1, 1), value=True).nonzero().flatten().to(torch.int32)
    longest = int((starts[1:] - starts[:-1]).max())
    with_padding = starts if cp_size > 1 else None
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        cu_seqlens_q_padded=with_padding,
        cu_seqlens_kv_padded=with_padding,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        total_tokens=len(row),
    )
