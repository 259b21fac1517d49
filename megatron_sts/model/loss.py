"""The training loss: summed over valid tokens. The division by the global number of tokens happens once, with the gradients."""

from __future__ import annotations

import torch


def masked_loss(
    token_losses: torch.Tensor, loss_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """``token_losses`` and ``loss_mask`` [b, s] -> (loss sum, number of tokens as int, both detached for reporting).

    The triple is what megatron-core's schedules expect under ``calculate_per_token_loss``: gradients of the sum are divided
    by the token count of the whole global batch, whatever the parallel layout.
    """
    loss_sum = (token_losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().to(torch.int)
    return loss_sum, num_tokens, {"loss_sum": loss_sum.detach(), "num_tokens": num_tokens.detach()}
