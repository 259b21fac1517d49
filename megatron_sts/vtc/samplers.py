"""Which tokens of an image to keep: one class per rule, none of which looks at the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_sts.config.schema import VtcConfig
from megatron_sts.config.uniform import check_counts, uniform_tokens
from megatron_sts.vtc.pooled import pooled_tokens

STREAM = 2
"""Last counter word: keeps these draws apart from those of other rooms that share seed and stage."""

ImageKey = tuple[int, int]
"""(sample index in the stage's data order, number of the image in the sample): the same in every parallel layout."""


class Sampler(Protocol):
    """Chooses tokens for a list of images."""

    def indices(self, keys: Sequence[ImageKey], num_tokens_in: int, num_tokens_out: int) -> torch.Tensor:
        """Kept tokens of each image, int64 [len(keys), num_tokens_out], distinct and ascending, on the CPU."""
        ...


class UniformSampler:
    """The same evenly spaced tokens for every image; see ``uniform_tokens``."""

    def indices(self, keys: Sequence[ImageKey], num_tokens_in: int, num_tokens_out: int) -> torch.Tensor:
        return _same_tokens(uniform_tokens, num_tokens_in, num_tokens_out).expand(len(keys), -1).clone()


class RandomSampler:
    """For each image an equally likely subset of its tokens, a pure function of (seed, stage, key).

    Philox with key (seed, stage), counter from the image's key; the tokens with the smallest raw 64-bit outputs are
    kept (raw output is stable over NumPy versions and platforms).
    """

    def __init__(self, seed: int, stage: int) -> None:
        self._philox_key = [seed, stage]

    def indices(self, keys: Sequence[ImageKey], num_tokens_in: int, num_tokens_out: int) -> torch.Tensor:
        check_counts(num_tokens_in, num_tokens_out)
        kept = np.empty((len(keys), num_tokens_out), dtype=np.int64)
        for row, key in zip(kept, keys, strict=True):
            row[:] = self._subset(key, num_tokens_in, num_tokens_out)
        return torch.from_numpy(kept)

    def _subset(self, key: ImageKey, num_tokens_in: int, num_tokens_out: int) -> NDArray[np.int64]:
        sample_index, image_number = key
        philox = np.random.Philox(key=self._philox_key, counter=[0, sample_index, image_number, STREAM])
        return np.sort(np.argsort(philox.random_raw(num_tokens_in), kind="stable")[:num_tokens_out])


class PooledSampler:
    """The centre of each area that ``pooled`` averages: where its tokens stand."""

    def indices(self, keys: Sequence[ImageKey], num_tokens_in: int, num_tokens_out: int) -> torch.Tensor:
        return _same_tokens(pooled_tokens, num_tokens_in, num_tokens_out).expand(len(keys), -1).clone()


@cache
def _same_tokens(rule: Callable[[int, int], tuple[int, ...]], num_tokens_in: int, num_tokens_out: int) -> torch.Tensor:
    """Kept for later calls: callers get copies of it."""
    return torch.tensor(rule(num_tokens_in, num_tokens_out), dtype=torch.int64)


def make_sampler(vtc: VtcConfig, seed: int, stage: int) -> Sampler:
    """What a stage knows of its kept tokens before it sees the image; for samplers that look, only how many."""
    if vtc.sampler == "random":
        return RandomSampler(seed, stage)
    return PooledSampler() if vtc.sampler == "pooled" else UniformSampler()
