"""Keys and values of earlier tokens, which stay with the attention layers while the model generates.

megatron-core's own (``StaticInferenceContext``) takes every row's last token for its newest one, so shorter rows would be
padded on the left, and past the prompt it tells Transformer Engine to mask nothing, so that padding would be seen. It also
keeps keys as they are before RoPE, and rotates all of them anew for each token. Here rows end where they end, a mask hides
the gap between a row and its answer, keys are kept rotated, and the same few lines serve torch's and Transformer Engine's
layers: only the core attention is replaced, which has no weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from megatron_sts.mcore.module import unwrap


@dataclass(frozen=True)
class Window:
    """Which tokens of a micro-batch a forward pass computes: its rows of b tokens from slot ``start`` on."""

    microbatch: int
    start: int
    """0: the prompt, in which a token sees all before it; else one token a row."""
    num_slots: int
    """Tokens of a row when its answer is as long as it may get."""
    newest: torch.Tensor
    """int64 [b]: which of a row's tokens, counted from ``start``, the logits follow."""
    is_visible: torch.Tensor
    """bool [b, num_slots]: slots that an answer's tokens see, if they are not later ones."""


class KeyValueCache:
    """Where the model is while it generates. Set ``now`` before each forward pass of a chunk."""

    now: Window

    def newest_only(self, _head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """A forward pre-hook of the output layer: hidden states [s, b, h] of one token a row [1, b, h]."""
        hidden = inputs[0]
        places = self.now.newest.view(1, -1, 1).expand(1, -1, hidden.shape[-1])
        return hidden.gather(0, places), *inputs[1:]


class CachedAttention(torch.nn.Module):
    """A core attention that remembers. Computes with torch's SDPA, as ``SdpaCoreAttention`` does."""

    def __init__(self, cache: KeyValueCache) -> None:
        super().__init__()
        self._cache = cache
        self._memory: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Of each micro-batch keys and values, [b, groups, num_slots, d]."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_mask: Any, **_unused: Any
    ) -> torch.Tensor:
        """``query`` [s, b, n, d], ``key``/``value`` [s, b, groups, d], positions applied -> [s, b, n * d]."""
        now, (sequence, batch, heads, _) = self._cache.now, query.shape
        end = now.start + sequence
        if now.start == 0:
            shape = (batch, key.shape[2], now.num_slots, key.shape[3])
            self._memory[now.microbatch] = key.new_empty(shape), value.new_empty(shape)
        keys, values = self._memory[now.microbatch]
        keys[:, :, now.start : end] = key.permute(1, 2, 0, 3)
        values[:, :, now.start : end] = value.permute(1, 2, 0, 3)
        attended = F.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            keys[:, :, :end],
            values[:, :, :end],
            attn_mask=now.is_visible[:, None, None, :end] if now.start else None,
            is_causal=now.start == 0,
            enable_gqa=key.shape[2] != heads,
        )
        return attended.permute(2, 0, 1, 3).reshape(sequence, batch, -1)


@contextmanager
def cached_attention(chunks: Sequence[torch.nn.Module]) -> Iterator[KeyValueCache]:
    """Within, decoder layers remember, and the output layer gives logits [b, 1, vocab / tp] of ``Window.newest`` alone."""
    cache = KeyValueCache()
    with ExitStack() as after:
        for language in (unwrap(chunk).language for chunk in chunks):
            for layer in language.decoder.layers:
                attention = layer.self_attention
                after.callback(setattr, attention, "core_attention", attention.core_attention)
                attention.core_attention = CachedAttention(cache)
            if language.post_process:
                after.callback(language.output_layer.register_forward_pre_hook(cache.newest_only).remove)
        yield cache
