"""Weights from which a tiny decoder learns to look things up: heads that begin by looking a few tokens back, or at like tokens.

A fresh decoder of this size needs hundreds of steps of drills before such heads appear by themselves. Here they are laid
into queries and keys, through what RoPE does to them: with frequencies f_i, a query u and a key R(d)u score
sum_i |u_i|^2 cos(f_i (distance - d)), which is largest d tokens back, whatever the words are. Nothing is fixed: all of it
is trained on.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from megatron_sts.config.architecture import LanguageConfig

OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
"""The two matrices through which a layer writes to the residual stream."""
BACK_SCORES = 4.0
"""How much more attention's logit is at the wanted distance than one token beside it."""
LIKE_SCORES = 7.0
"""The logit of a token for an earlier one of the same word; of another word it is random, with a quarter as deviation."""
SELF_SCORES = 3.0
"""What a head that looks at like tokens takes from the logit of the token itself."""
HEADS = ((1, 2, 3, "like"), (1, "like", "like", "like"), (1, "like", None, None))
"""Of layers 0, 1 and all further ones: a distance in tokens, like tokens, or random. Further heads are random."""


def starting_weights(language: LanguageConfig, seed: int) -> dict[str, torch.Tensor]:
    """All weights of a decoder without groups of queries, named as ``mcore.weights.named_weights`` names them.

    Words get random directions of unit length, all plus one direction common to them and at right angles (which heads
    that ignore the words read); the head has the same directions without it, so that copying a word is easy.
    """
    generator = torch.Generator().manual_seed(seed)
    hidden, ffn, num_layers = language.hidden_size, language.ffn_hidden_size, language.num_layers

    def random(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * std

    common = torch.full((hidden,), hidden**-0.5)
    words = random(language.vocab_size, hidden, std=1.0)
    words = functional.normalize(words - torch.outer(words @ common, common), dim=1)
    weights = {
        "language.embedding.word_embeddings.weight": words + common,
        "language.output_layer.weight": words.clone(),
        "language.decoder.final_layernorm.weight": torch.ones(hidden),
    }
    for layer in range(num_layers):
        prefix = f"language.decoder.layers.{layer}."
        output_std = (2 * num_layers) ** -0.5
        heads = HEADS[min(layer, len(HEADS) - 1)]
        kinds = [*heads, *[None] * language.num_attention_heads][: language.num_attention_heads]
        rows = [
            _head(kind, common, hidden // language.num_attention_heads, language.rotary_base, random) for kind in kinds
        ]
        weights |= {
            f"{prefix}self_attention.linear_qkv.weight": torch.cat(rows),
            f"{prefix}self_attention.linear_proj.weight": random(hidden, hidden, std=output_std * hidden**-0.5),
            f"{prefix}mlp.linear_fc1.weight": random(2 * ffn, hidden, std=0.5 * hidden**-0.5),
            f"{prefix}mlp.linear_fc2.weight": random(hidden, ffn, std=output_std * ffn**-0.5),
            f"{prefix}input_layernorm.weight": torch.ones(hidden),
            f"{prefix}pre_mlp_layernorm.weight": torch.ones(hidden),
        }
    return weights


def _head(kind, common, width, base, random):
    """Rows of queries, keys and values, [3 * width, hidden], of one head."""
    hidden = len(common)
    values = random(width, hidden, std=0.5 * hidden**-0.5)
    if kind is None:
        return torch.cat([random(2 * width, hidden, std=0.5 * hidden**-0.5), values])
    half = width // 2
    frequencies = base ** -(torch.arange(half) / half)
    read = common * (2 / hidden) ** 0.5  # a normalised token has the length hidden ** 0.5, half of its square common
    if kind == "like":
        project = torch.zeros(width, hidden)
        slow = torch.arange(half // 2, half)
        rows = torch.cat([slow, slow + half])
        scale = (LIKE_SCORES * width**0.5 / (half * 0.5)) ** 0.5
        project[rows] = scale * random(len(rows), hidden, std=hidden**-0.5)
        project[rows] -= torch.outer(project[rows] @ common, common)
        away = torch.zeros(width)
        away[: half // 4] = (SELF_SCORES * width**0.5 / (half // 4)) ** 0.5
        return torch.cat([project + torch.outer(away, read), project - torch.outer(away, read), values])
    fast = torch.arange(half) < half // 2
    strength = (BACK_SCORES * width**0.5 / (1 - frequencies[fast].cos()).sum()) ** 0.5
    angles = kind * frequencies
    query = torch.cat([strength * fast, torch.zeros(half)])
    key = strength * torch.cat([fast * angles.cos(), fast * angles.sin()])
    return torch.cat([torch.outer(query, read), torch.outer(key, read), values])
