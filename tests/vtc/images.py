"""Random visual tokens, pixels and instructions that the tests of looking samplers share."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from megatron_sts.vtc.anchored import AnchoredSampler
from megatron_sts.vtc.guided import GuidedSampler
from megatron_sts.vtc.seen import SeenImages

PATCH_PX = 4


def draw_images(side: int, seed: int, num_images: int = 3, width: int = 64, num_words: int = 5) -> SeenImages:
    """Gaussian tokens, wider than they are many, and words: no scores tie. The first image has no instruction."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(num_images, num_words, generator=generator) < 0.7
    mask[:1] = False
    return SeenImages(
        torch.randn(num_images, side * side, width, generator=generator),
        torch.randint(0, 256, (num_images, 3, *(side * PATCH_PX,) * 2), generator=generator, dtype=torch.uint8),
        torch.randn(num_images, num_words, width, generator=generator),
        mask,
    )


seeds = st.integers(0, 2**31)
sizes = st.integers(1, 7).flatmap(lambda side: st.tuples(st.just(side), st.integers(1, side * side)))
shares = st.integers(0, 10).flatmap(lambda a: st.tuples(st.just(a / 10), st.integers(0, 10 - a).map(lambda b: b / 10)))
samplers = st.one_of(st.builds(GuidedSampler), shares.map(lambda pair: AnchoredSampler(*pair)))
