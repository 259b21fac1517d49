"""Which tokens of an image to keep: one class per rule, none of which looks at the image."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from math import gcd, isqrt
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_sts.config.schema import VtcConfig
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
        kept = torch.tensor(uniform_tokens(num_tokens_in, num_tokens_out), dtype=torch.int64)
        return kept.repeat(len(keys), 1)


class RandomSampler:
    """For each image an equally likely subset of its tokens, a pure function of (seed, stage, key).

    Philox with key (seed, stage), counter from the image's key; the tokens with the smallest raw 64-bit outputs are
    kept (raw output is stable over NumPy versions and platforms).
    """

    def __init__(self, seed: int, stage: int) -> None:
        self._philox_key = [seed, stage]

    def indices(self, keys: Sequence[ImageKey], num_tokens_in: int, num_tokens_out: int) -> torch.Tensor:
        _check_counts(num_tokens_in, num_tokens_out)
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
        kept = torch.tensor(pooled_tokens(num_tokens_in, num_tokens_out), dtype=torch.int64)
        return kept.repeat(len(keys), 1)


def make_sampler(vtc: VtcConfig, seed: int, stage: int) -> Sampler:
    """What a stage knows of its kept tokens before it sees the image; for samplers that look, only how many."""
    if vtc.sampler == "random":
        return RandomSampler(seed, stage)
    return PooledSampler() if vtc.sampler == "pooled" else UniformSampler()


@lru_cache(maxsize=64)
def uniform_tokens(num_tokens_in: int, num_tokens_out: int) -> tuple[int, ...]:
    """Evenly spaced tokens of a row-major square grid (of a line, if ``num_tokens_in`` is no square).

    A stride in the flat sequence resonates with the row width (stride 2 on an even width keeps whole columns). Here
    every row and every column of a g x g grid keeps floor(k/g) or ceil(k/g) tokens; half the tokens of an even grid
    are a checkerboard. Above one half it is the dropped tokens that are spread.
    """
    _check_counts(num_tokens_in, num_tokens_out)
    side = isqrt(num_tokens_in)
    if side * side != num_tokens_in:
        return tuple((2 * j + 1) * num_tokens_in // (2 * num_tokens_out) for j in range(num_tokens_out))
    chosen = _spread(side, min(num_tokens_out, num_tokens_in - num_tokens_out))
    kept = chosen if 2 * num_tokens_out <= num_tokens_in else ~chosen
    return tuple(np.flatnonzero(kept).tolist())


def _spread(side: int, count: int) -> NDArray[np.bool_]:
    """``count`` <= side^2/2 cells of a grid, [side, side]: the most even of the patterns with each possible slope."""
    slopes = [slope for slope in range(1, side + 1) if gcd(slope, side) == 1]
    return min((_diagonals(side, count, slope) for slope in slopes), key=_crowding)


def _diagonals(side: int, count: int, slope: int) -> NDArray[np.bool_]:
    """Cells on evenly spaced diagonals (column + slope * row) mod side, [side, side].

    With a slope coprime to the side a diagonal meets each row and each column once. ``count`` makes so many whole
    diagonals; the rest lies on one more, midway in the widest gap, in evenly spaced rows.
    """
    num_whole, num_rest = divmod(count, side)
    row = np.arange(side)[:, None]
    diagonal: NDArray[np.int64] = (np.arange(side)[None, :] + slope * row) % side
    starts = [i * side // max(num_whole, 1) for i in range(max(num_whole, 1))]
    width, start = max((after - before, before) for before, after in pairwise([*starts, side]))
    rest_rows = [i * side // num_rest for i in range(num_rest)]
    rest: NDArray[np.bool_] = (diagonal == start + width // 2) & np.isin(row, rest_rows)
    return np.isin(diagonal, starts[:num_whole]) | rest


def _crowding(cells: NDArray[np.bool_]) -> tuple[int, ...]:
    """Number of pairs of cells at each squared distance on the torus, nearest first; smaller is more even.

    Integers, so that ties are exact and every machine settles them alike.
    """
    side = len(cells)
    spectrum = np.fft.fft2(cells)
    pairs = np.rint(np.fft.ifft2(spectrum * spectrum.conj()).real).astype(np.int64)
    offset = np.minimum(np.arange(side), side - np.arange(side)) ** 2
    squared_distance = offset[:, None] + offset[None, :]
    return tuple(np.bincount(squared_distance.ravel(), weights=pairs.ravel()).astype(np.int64).tolist())


def _check_counts(num_tokens_in: int, num_tokens_out: int) -> None:
    if not 0 < num_tokens_out <= num_tokens_in:
        raise ValueError(f"cannot keep {num_tokens_out} of {num_tokens_in} visual tokens")
