"""The next token out of logits: the likeliest, or one drawn. Must not know where logits come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_sts.config.errors import refuse
from megatron_sts.mcore.vocab import hide_ids_from, vocab_parallel_argmax, whole_vocabulary


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Filters apply in the order of transformers: temperature, top_k, top_p."""

    temperature: float = 0.0
    """Logits are divided by it; 0: greedy, and nothing else here counts."""
    top_p: float = 1.0
    """Only the likeliest tokens whose probabilities just reach this sum."""
    top_k: int = 0
    """Only so many of the likeliest tokens; 0: all."""
    seed: int = 0
    """A request's answer depends on it and on the request's number, not on batches or layout."""
    first_number: int = 0
    """The number of the first request of those asked together, so that no draws repeat where several lots are asked."""

    def __post_init__(self) -> None:
        # Logits divided by less leave softmax nothing but 0, 1 and, in the end, nan.
        if self.temperature != 0 and not 1e-6 <= self.temperature < math.inf:
            refuse(
                "temperature", self.temperature, "neither 0 nor in [1e-6, inf)", "use 0 for greedy answers, or about 1"
            )
        if not 0 < self.top_p <= 1:
            refuse("top_p", self.top_p, "not in (0, 1]", "use 1 to keep all tokens")
        if self.top_k < 0:
            refuse("top_k", self.top_k, "below 0", "use 0 to keep all tokens")
        if not 0 <= self.seed < 2**63:
            refuse("seed", self.seed, "not in [0, 2^63)", "use another number")

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0

    def draws(self, requests: Sequence[int], step: int) -> torch.Tensor:
        """The uniform random number behind token ``step`` of each of these requests, float64 in [0, 1)."""
        streams = [np.random.Philox(key=[self.seed, self.first_number + request], counter=step) for request in requests]
        return torch.tensor([np.random.Generator(stream).random() for stream in streams], dtype=torch.float64)


def next_tokens(
    logits: torch.Tensor, sampling: Sampling, requests: Sequence[int], step: int, num_ids: int
) -> torch.Tensor:
    """Token ``step`` of the answers to ``requests`` (their numbers), int64 [b]; a tensor-parallel collective.

    ``logits`` [b, vocab / tp] of this rank; ids from ``num_ids`` on, which have no text, are never chosen.
    """
    logits = hide_ids_from(logits, num_ids)
    if sampling.is_greedy:
        return vocab_parallel_argmax(logits)
    return sample(whole_vocabulary(logits), sampling, sampling.draws(requests, step).to(logits.device))


def sample(logits: torch.Tensor, sampling: Sampling, draws: torch.Tensor) -> torch.Tensor:
    """Inverts the cumulative distribution of ``logits`` [b, vocab] at ``draws`` [b], likeliest token first: int64 [b]."""
    ranked, tokens = (logits.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ranked = ranked[:, : sampling.top_k]
    shares = ranked.softmax(dim=-1)
    shares = shares.where(shares.cumsum(dim=-1) - shares < sampling.top_p, 0.0)
    reached = shares.cumsum(dim=-1)
    places = torch.searchsorted(reached, draws[:, None] * reached[:, -1:], right=True)
    # Rounding may carry the largest draws past the last token that has a share.
    places = places.clamp(max=(shares > 0).sum(dim=-1, keepdim=True) - 1)
    return tokens.gather(1, places).squeeze(1)
