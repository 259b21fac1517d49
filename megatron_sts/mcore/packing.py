"""How attention stays within the samples that share a row."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig


def attention_within(segments: torch.Tensor | None, config: TransformerConfig) -> dict[str, Any]:
    """What ``GPTModel`` is called with so that tokens attend within their segment, ``segments`` [b, s] or None.

    Transformer Engine takes the ends of the segments and computes nothing between them; torch's attention gets a mask.
    """
    if segments is None:
        return {"attention_mask": None}
    if config.transformer_impl == "transformer_engine":
        return {"attention_mask": None, "packed_seq_params": packed_seq_params(segments)}
    return {"attention_mask": hidden_pairs(segments)}


def hidden_pairs(segments: torch.Tensor) -> torch.Tensor:
    """True where a query may not see a key, bool [b, 1, s, s]. ``segments`` int [b, s]."""
    length = segments.shape[1]
    is_later = torch.ones(length, length, dtype=torch.bool, device=segments.device).triu(1)
    return (is_later | (segments[:, :, None] != segments[:, None, :])).unsqueeze(1)


def packed_seq_params(segments: torch.Tensor) -> PackedSeqParams:
    """One row's segments, each a run of equal numbers, for Transformer Engine's THD attention. ``segments`` int [1, s].

    Padding is a segment like another: what it computes carries no loss.
    """
    [row] = segments
    starts = torch.nn.functional.pad(row[1:] != row[:-1], (1, 1), value=True).nonzero().flatten().to(torch.int32)
    longest = int((starts[1:] - starts[:-1]).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        total_tokens=len(row),
    )
