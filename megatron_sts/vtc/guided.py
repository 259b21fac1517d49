"""Instruction-guided selection: the tokens most like the instruction's words. The third sampler of arXiv 2509.18150."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_sts.config.uniform import uniform_tokens
from megatron_sts.vtc.seen import SeenImages


class GuidedSampler:
    """The k most relevant tokens of each image; the uniform ones for an image without an instruction."""

    @torch.no_grad()
    def select(self, images: SeenImages, num_kept: int) -> torch.Tensor:
        """See ``LookingSampler``."""
        num_tokens_in = images.visual.shape[1]
        uniform = torch.tensor(uniform_tokens(num_tokens_in, num_kept), device=images.visual.device)
        guided = top_tokens(relevance(images), num_kept)
        return torch.where(images.mask.any(1, keepdim=True), guided, uniform)


def relevance(images: SeenImages) -> torch.Tensor:
    """How much each visual token has to do with its image's instruction, fp32 [n, t] in [-1, 1].

    The largest cosine similarity with any one word (FILIP's token-wise score, Yao et al. 2021, arXiv 2111.07783): a
    token is relevant if one word names it, where a mean over words would drown that word among articles and
    punctuation. 1 for every token of an image without an instruction.
    """
    visual, instruction, mask = images.visual, images.instruction, images.mask
    if not instruction.shape[1]:
        return visual.new_ones(visual.shape[:2], dtype=torch.float32)
    tokens, words = (F.normalize(x.float(), dim=-1) for x in (visual, instruction))
    similarity = (tokens @ words.mT).masked_fill(~mask.unsqueeze(1), -1.0)
    return torch.where(mask.any(1).unsqueeze(1), similarity.amax(-1), 1.0)


def top_tokens(scores: torch.Tensor, num_kept: int) -> torch.Tensor:
    """The tokens with the largest of ``scores`` [n, t], int64 [n, num_kept], ascending; of equal scores the first."""
    order = scores.sort(dim=1, descending=True, stable=True).indices
    return order[:, :num_kept].sort(dim=1).values
