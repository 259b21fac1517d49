"""Keeps the chosen tokens of each image."""

from __future__ import annotations

import torch


def compress(features: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Selects ``indices`` [n, k] (distinct, ascending) from ``features`` [n, t, d]; returns [n, k, d], differentiable.

    Selection commutes with a token-wise projector, so a sampler that does not look at features selects before it and
    saves its work on dropped tokens. With k = t the only such selection is the identity: ``features`` itself.
    Distinct indices also make the backward scatter free of collisions, hence deterministic on a GPU.
    """
    (num_images, num_tokens_in, width), (num_rows, num_kept) = features.shape, indices.shape
    if num_rows != num_images or num_kept > num_tokens_in:
        raise ValueError(f"indices {tuple(indices.shape)} do not fit features {tuple(features.shape)} [n, t, d]")
    if num_kept == num_tokens_in:
        return features
    return features.gather(1, indices.to(features.device).unsqueeze(-1).expand(-1, -1, width))
