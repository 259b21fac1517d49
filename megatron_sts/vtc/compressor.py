"""Keeps the chosen tokens of each image."""

from __future__ import annotations

import torch


def compress(features: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Selects ``indices`` [v] (distinct, into the n x t tokens) from ``features`` [n, t, d]; returns [v, d], differentiable.

    Selection commutes with a token-wise projector, so a sampler that does not look at features selects before it and
    saves its work on dropped tokens. All n x t tokens are kept as they are, without a copy. Distinct indices also make
    the backward scatter free of collisions, hence deterministic on a GPU.

    Raises:
        ValueError: more indices than tokens.
    """
    tokens = features.flatten(0, 1)
    if len(indices) > len(tokens):
        raise ValueError(f"{len(indices)} tokens to keep of features {tuple(features.shape)} [n, t, d]")
    if len(indices) == len(tokens):
        return tokens
    return tokens.index_select(0, indices.to(features.device))
