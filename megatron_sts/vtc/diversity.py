"""Greedy choice of tokens that are good and unlike each other: MAP inference in a determinantal point process."""

from __future__ import annotations

import torch
import torch.nn.functional as F

RIDGE = 1e-3
"""Added to the kernel's diagonal: once the chosen tokens span all others, what is left is this, far above fp32 noise."""


def quality_kernel(visual: torch.Tensor, quality: torch.Tensor) -> torch.Tensor:
    """L_ij = q_i (cos(x_i, x_j) + ridge [i = j]) q_j: the L-ensemble of each image, fp32 [n, t, t].

    Args:
        visual: tokens x, [n, t, h].
        quality: q > 0, [n, t].
    """
    tokens = F.normalize(visual.float(), dim=-1)
    similarity = tokens @ tokens.mT
    similarity.diagonal(dim1=1, dim2=2).add_(RIDGE)
    return quality.unsqueeze(2) * similarity * quality.unsqueeze(1)


def condition(kernel: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The kernel given that ``chosen`` [n, a] are in the set: the Schur complement, [n, t, t], zero at chosen tokens.

    L - L_:A inv(L_AA) L_A:, through a Cholesky factor (Kulesza and Taskar 2012, arXiv 1207.6083, section 2.3).
    """
    num_tokens = kernel.shape[1]
    rows = kernel.gather(1, chosen.unsqueeze(2).expand(-1, -1, num_tokens))
    block = rows.gather(2, chosen.unsqueeze(1).expand(-1, chosen.shape[1], -1))
    explained = torch.linalg.solve_triangular(torch.linalg.cholesky(block), rows, upper=False)
    return kernel - explained.mT @ explained


def greedy_map(kernel: torch.Tensor, taken: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` tokens of each image, in the order of choice, int64 [n, count]; each raises log det of the chosen most.

    Fast greedy MAP (Chen, Zhang and Zhou 2018, arXiv 1709.05135): a Cholesky factor grows by a row a pick, so all
    picks cost O(t count^2). A loop over picks, none over images. Of equal gains the first token is chosen.

    Args:
        kernel: [n, t, t].
        taken: bool [n, t], tokens that may not be chosen; at least ``count`` others are left.
    """
    num_images, num_tokens, _ = kernel.shape
    gain = kernel.diagonal(dim1=1, dim2=2).masked_fill(taken, -torch.inf)
    factor = kernel.new_zeros(num_images, count, num_tokens)
    picks = torch.empty(num_images, count, dtype=torch.int64, device=kernel.device)
    for i in range(count):
        best, pick = gain.max(1, keepdim=True)
        picks[:, i] = pick.squeeze(1)
        seen = factor[:, :i]
        at_pick = pick.unsqueeze(2)
        row = kernel.gather(1, at_pick.expand(-1, -1, num_tokens)).squeeze(1)
        row = row - (seen.gather(2, at_pick.expand(-1, i, -1)) * seen).sum(1)
        factor[:, i] = row / best.clamp(min=torch.finfo(kernel.dtype).tiny).sqrt()
        gain = (gain - factor[:, i] ** 2).scatter(1, pick, -torch.inf)
    return picks
