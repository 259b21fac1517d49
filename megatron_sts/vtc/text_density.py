"""Where an image has writing, judged from its pixels alone: cheap, deterministic, no learned detector."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

Pick = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
STROKE_PX = 7
"""Window of the top-hats: they answer to strokes thinner than this, and not to the edges of larger shapes."""
POWER = 3
"""Of the answer before it is averaged: a few strong strokes count for more than much weak texture."""
NEIGHBOUR = 0.5
"""What the patches left and right add to a patch's density: writing runs in lines, texture need not."""


def text_density(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """How much thin, strong stroke each patch holds, ``pixels`` uint8 [n, 3, h, w] -> fp32 [n, side * side], row-major.

    The larger of white and black top-hat of the luminance (image minus its opening, closing minus image; Serra 1982),
    so writing may be darker or brighter than its ground. An edge between two large areas has no top-hat, a stroke has
    one on all its width: that tells writing from outlines, which gradient energy cannot. Densities compare patches of
    one image only. ``tools/bench_ocr.py`` measures what they find.
    """
    luminance = pixels.float().mean(1, keepdim=True) / 255
    white, black = luminance - _dilate(_erode(luminance)), _erode(_dilate(luminance)) - luminance
    density = F.adaptive_avg_pool2d(torch.maximum(white, black) ** POWER, side)
    along_line = density.new_tensor([NEIGHBOUR, 1.0, NEIGHBOUR]).view(1, 1, 1, 3)
    return F.conv2d(F.pad(density, (1, 1, 0, 0), mode="replicate"), along_line).flatten(1)


def _dilate(image: torch.Tensor) -> torch.Tensor:
    return _extreme(image, torch.maximum)


def _erode(image: torch.Tensor) -> torch.Tensor:
    return _extreme(image, torch.minimum)


def _extreme(image: torch.Tensor, pick: Pick) -> torch.Tensor:
    """The largest or smallest value in the window around each pixel; rows and columns apart, as a square is both."""
    padded = F.pad(image, (STROKE_PX // 2,) * 4, mode="replicate")
    return _along(_along(padded, 2, pick), 3, pick)


def _along(image: torch.Tensor, axis: int, pick: Pick) -> torch.Tensor:
    """Windows that grow by doubling: a few whole-image operations, where ``max_pool2d`` looks at all 49 pixels of each window."""
    width = 1
    while width < STROKE_PX:
        shift = min(width, STROKE_PX - width)
        length = image.shape[axis] - shift
        image = pick(image.narrow(axis, 0, length), image.narrow(axis, shift, length))
        width += shift
    return image
