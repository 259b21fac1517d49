"""Which visual tokens samplers keep, drawn on the picture. Knows no page, no sampler and no model."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

DIMMED = 0.2
"""What is left of a dropped patch's brightness."""


@dataclass(frozen=True)
class KeptTokens:
    """Of one picture."""

    pixels: NDArray[np.uint8]
    """[height, width, 3]"""
    question: str
    kept: Mapping[str, Sequence[int]]
    """By sampler, the tokens that stay, row-major on the picture's square grid."""
    num_tokens: int
    """Of the grid."""


def kept_figure(pictures: Sequence[KeptTokens], note: str) -> Figure:
    """A row a picture: as it is, then with what each sampler drops darkened."""
    samplers = list(pictures[0].kept)
    figure = Figure(figsize=(2.1 * (1 + len(samplers)), 2.5 * len(pictures) + 0.5), layout="constrained")
    rows = figure.subplots(len(pictures), 1 + len(samplers), squeeze=False)
    for axes, picture in zip(rows, pictures, strict=True):
        axes[0].imshow(picture.pixels, interpolation="nearest")
        axes[0].set_title(textwrap.fill(picture.question, 26), fontsize="small")
        for place, name in zip(axes[1:], samplers, strict=True):
            place.imshow(dimmed(picture, picture.kept[name]), interpolation="nearest")
            place.set_title(name, fontsize="small")
        for place in axes:
            place.set_xticks([])
            place.set_yticks([])
    figure.suptitle(note, fontsize="medium")
    return figure


def dimmed(picture: KeptTokens, kept: Sequence[int]) -> NDArray[np.float64]:
    """The picture in [0, 1], its patches dark but for the kept ones, [height, width, 3]."""
    height, width, _ = picture.pixels.shape
    side = isqrt(picture.num_tokens)
    is_kept = np.zeros(picture.num_tokens, dtype=bool)
    is_kept[list(kept)] = True
    rows, columns = (np.arange(size) * side // size for size in (height, width))
    bright = np.where(is_kept.reshape(side, side)[np.ix_(rows, columns)], 1.0, DIMMED)
    return picture.pixels / 255 * bright[..., None]
