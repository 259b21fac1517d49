"""Weights from which a tiny decoder learns to look things up: heads that begin by looking a few tokens back, or at like tokens.

A fresh decoder of this size needs hundreds of steps of drills before such heads appear by themselves. Here they are laid
into queries and keys. Back: through what RoPE does to them; with frequencies f_i, a query u and a key R(d)u score
sum_i |u_i|^2 cos(f_i (distance - d)), which is largest d tokens back, whatever the words are. Like: words have one part of equal
length for each such head, which it compares. Count: the same, beside the first token, which is always there and whose share of
attention, which alone is passed on, therefore falls with the number of like tokens. Nothing is fixed: all of it is trained on.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from megatron_sts.config.architecture import LanguageConfig
from megatron_sts.data.template import load_tokenizer

OUTPUTS = ("self_attention.linear_proj.weight", "mlp.linear_fc2.weight")
"""The two matrices through which a layer writes to the residual stream."""
BACK_SCORES = 4.0
"""How much more attention's logit is at the wanted distance than one token beside it."""
LIKE_SCORES = 7.0
"""The logit of a token for an earlier one of the same word; of another word it is random, with a quarter as deviation."""
SELF_SCORES = 3.0
"""What a head that looks at like tokens takes from the logit of the token itself; one that counts takes nothing."""
FIRST_SCORES = 7.7
"""The logit of the first token for a head that counts: as much as two like tokens."""
HEADS: tuple[tuple[int | str | None, ...], ...] = (
    (1, 2, "count", "like"), (1, 3, "like", "like"), (1, "count", "like", None), (1, 3, 4, "like"), (1, 2, "like", None)
)  # fmt: skip
"""Of layers 0 to 3 and all further ones: a distance in tokens, like tokens, how many there are, or random. In layer 3 the second object
of a question finds the first ("a above the b", "a left of the b"), in layer 4 the answer finds the second."""
Random = Callable[..., torch.Tensor]


class Start:
    """Draws the weights of a decoder that has as many query groups as heads."""

    def __init__(self, language: LanguageConfig, seed: int) -> None:
        self._language = language
        self._generator = torch.Generator().manual_seed(seed)
        self._hidden, self._width = language.hidden_size, language.hidden_size // language.num_attention_heads
        self._half = self._width // 2
        self._frequencies = language.rotary_base ** -(torch.arange(self._half) / self._half)
        basis, _ = torch.linalg.qr(self._random(self._hidden, self._hidden, std=1.0))
        self._common, self._first = basis.T[:2]
        # Half of a head's dimensions turn slowly; the pair that turns slowest is left to the first token.
        self._parts = basis.T[2:].split(self._half - 2)
        self._words = self._draw_words()

    def weights(self) -> dict[str, torch.Tensor]:
        """All of them, named as ``mcore.weights.named_weights`` names them.

        Words have random directions of unit length, all plus one direction common to them and at right angles (which heads that
        ignore the words read); the head has the same directions without it, so that copying a word is easy.
        """
        hidden, ffn, num_layers = self._hidden, self._language.ffn_hidden_size, self._language.num_layers
        found = {
            "language.embedding.word_embeddings.weight": self._words + self._common,
            "language.output_layer.weight": self._words.clone(),
            "language.decoder.final_layernorm.weight": torch.ones(hidden),
        }
        for layer in range(num_layers):
            prefix, output_std = f"language.decoder.layers.{layer}.", (2 * num_layers) ** -0.5
            found |= {
                f"{prefix}self_attention.linear_qkv.weight": torch.cat(self._heads(layer)),
                f"{prefix}self_attention.linear_proj.weight": self._random(
                    hidden, hidden, std=output_std * hidden**-0.5
                ),
                f"{prefix}mlp.linear_fc1.weight": self._random(2 * ffn, hidden, std=0.5 * hidden**-0.5),
                f"{prefix}mlp.linear_fc2.weight": self._random(hidden, ffn, std=output_std * ffn**-0.5),
                f"{prefix}input_layernorm.weight": torch.ones(hidden),
                f"{prefix}pre_mlp_layernorm.weight": torch.ones(hidden),
            }
        return found

    def _random(self, *shape: int, std: float) -> torch.Tensor:
        return torch.randn(*shape, generator=self._generator) * std

    def _draw_words(self) -> torch.Tensor:
        """Each part of a word's direction has the same length for all words, but for the first token's, which is one of its own."""
        words = torch.zeros(self._language.vocab_size, self._hidden)
        for part in self._parts:
            drawn = functional.normalize(self._random(len(words), len(part), std=1.0), dim=1)
            words += (len(part) / (self._hidden - 2)) ** 0.5 * drawn @ part
        words[load_tokenizer("scenes", "chat").bos_id] = self._first
        return words

    def _heads(self, layer: int) -> list[torch.Tensor]:
        kinds = HEADS[min(layer, len(HEADS) - 1)]
        kinds = (*kinds, *[None] * self._language.num_attention_heads)[: self._language.num_attention_heads]
        return [
            self._head(kind, self._parts[(layer + number) % ((self._hidden - 2) // (self._half - 2))])
            for number, kind in enumerate(kinds)
        ]

    def _head(self, kind: int | str | None, part: torch.Tensor) -> torch.Tensor:
        """Rows of queries, keys and values, [3 x width, hidden], of one head; ``part`` of words is what it may compare."""
        std = 0.5 * self._hidden**-0.5
        values = self._random(self._width, self._hidden, std=std)
        if kind is None:
            return torch.cat([self._random(2 * self._width, self._hidden, std=std), values])
        if isinstance(kind, int):
            return torch.cat([*self._looking_back(kind), values])
        query, key = self._looking_at_like(part, 0.0 if kind == "count" else SELF_SCORES)
        if kind == "count":
            scale, is_first = (FIRST_SCORES * self._width**0.5) ** 0.5, self._first * (2 / self._hidden) ** 0.5
            query[-1] = scale * self._read
            key[-1] = scale * is_first
            values = torch.outer(self._random(self._width, std=1.0), is_first)
        return torch.cat([query, key, values])

    @property
    def _read(self) -> torch.Tensor:
        """What gives 1 for every normalised token, of whose squared length, hidden, half is common."""
        return self._common * (2 / self._hidden) ** 0.5

    def _looking_back(self, distance: int) -> tuple[torch.Tensor, torch.Tensor]:
        fast = torch.arange(self._half) < self._half // 2
        strength = (BACK_SCORES * self._width**0.5 / (1 - self._frequencies[fast].cos()).sum()) ** 0.5
        angles = distance * self._frequencies
        query = torch.cat([strength * fast, torch.zeros(self._half)])
        key = strength * torch.cat([fast * angles.cos(), fast * angles.sin()])
        return torch.outer(query, self._read), torch.outer(key, self._read)

    def _looking_at_like(self, part: torch.Tensor, from_itself: float) -> tuple[torch.Tensor, torch.Tensor]:
        """By the slow half of RoPE's frequencies, which turn little within a sample; the fastest keep a token from itself, and for
        that favour some distances."""
        slow = torch.arange(self._half // 2, self._half - 1)
        compared = torch.zeros(self._width, self._hidden)
        length_squared = self._hidden / 2 * len(part) / (self._hidden - 2)
        compared[torch.cat([slow, slow + self._half])] = (LIKE_SCORES * self._width**0.5 / length_squared) ** 0.5 * part
        away = torch.zeros(self._width)
        away[: self._half // 4] = (from_itself * self._width**0.5 / (self._half // 4)) ** 0.5
        away = torch.outer(away, self._read)
        return compared + away, compared - away


def starting_weights(language: LanguageConfig, seed: int) -> dict[str, torch.Tensor]:
    """Those of a fresh decoder."""
    return Start(language, seed).weights()
