"""Pictures in tiles: how one is cut and which tokens it becomes, from its width and height and the config alone. Torch-free.

The arithmetic is that of transformers' ``LlavaNextForConditionalGeneration`` and ``LlavaOnevisionForConditionalGeneration``, in floats
as there, so that counts agree for every size. Lengths are patches unless pixels are said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.architecture import TilesConfig, VisionConfig
from megatron_sts.config.schema import VtcConfig
from megatron_sts.config.section import Section
from megatron_sts.config.tokens import kept_tokens
from megatron_sts.config.uniform import uniform_tokens

Resolutions = Sequence[tuple[int, int]]
"""(height, width) in pixels."""
Mask = NDArray[np.bool_]
SHRINKS_ABOVE = 1.1
"""Sides of a mosaic, in units of what ``anyres_max`` allows, from which on it is interpolated."""


class Block(Section):
    """A rectangle of visual tokens: an overview, the tiles joined to a mosaic, or a frame."""

    first_view: int
    """The view, of all views of the picture, whose patches it begins with."""
    side: int
    """Patches along a view."""
    columns: int = 1
    """Views beside each other; those below follow."""
    top: int = 0
    left: int = 0
    height: int
    """Of what is no padding, which begins at ``top`` and ``left``."""
    width: int
    rows_out: int
    """Tokens below each other: ``height``, or what that is interpolated to."""
    columns_out: int
    has_newlines: bool = False
    """A newline token ends each row that keeps a token."""
    ratio: int = 0
    """Which of the keep ratios is its own; the last one counts for all further."""

    @property
    def is_interpolated(self) -> bool:
        """Whether a token is a mean of up to four patches."""
        return (self.rows_out, self.columns_out) != (self.height, self.width)


class Picture(Section):
    """What a picture, or the frames of a clip, become: tokens block by block, each row by row."""

    num_views: int
    """Squares that the tower sees."""
    blocks: tuple[Block, ...]
    ends_with_newline: bool = False

    @property
    def num_tokens(self) -> int:
        """Without VTC, newline tokens included."""
        rows = ((block.rows_out, block.columns_out + block.has_newlines) for block in self.blocks)
        return sum(height * width for height, width in rows) + self.ends_with_newline


def tiled(width: int, height: int, vision: VisionConfig) -> Picture:
    """A picture of so many pixels, in tiles: its overview, then the mosaic."""
    assert vision.tiles is not None
    side = patches_along(vision)
    pixels_high, pixels_wide = best_resolution(width, height, vision.tiles.resolutions)
    rows, columns = pixels_high // vision.image_size, pixels_wide // vision.image_size
    top, left = _padding(width, height, side * rows, side * columns)
    high, wide = side * rows - 2 * top, side * columns - 2 * left
    rows_out, columns_out = _shrunk(high, wide, side, vision.tiles)
    mosaic = Block(first_view=1, side=side, columns=columns, top=top, left=left, height=high, width=wide,
                   rows_out=rows_out, columns_out=columns_out, has_newlines=True, ratio=1)  # fmt: skip
    return Picture(num_views=1 + rows * columns, blocks=(_whole_view(side, 0, 0), mosaic))


def square(number: int, vision: VisionConfig) -> Picture:
    """A sample's picture ``number`` (0-based) of several, in one square."""
    return Picture(num_views=1, blocks=(_whole_view(patches_along(vision), 0, number),), ends_with_newline=True)


def clip(num_frames: int, vision: VisionConfig) -> Picture:
    """Frames of a video: one square each, half as many tokens along each side, one newline token behind the last."""
    side = patches_along(vision)
    half = math.ceil(side / 2)
    frames = (_whole_view(side, number, number) for number in range(num_frames))
    pooled = tuple(frame.model_copy(update={"rows_out": half, "columns_out": half}) for frame in frames)
    return Picture(num_views=num_frames, blocks=pooled, ends_with_newline=True)


def patches_along(vision: VisionConfig) -> int:
    """A view's side in patches."""
    return vision.image_size // vision.patch_size


def best_resolution(width: int, height: int, resolutions: Resolutions) -> tuple[int, int]:
    """(height, width) in pixels of the resolution that leaves most of a picture's pixels and, of such, wastes fewest."""

    def fit(resolution: tuple[int, int]) -> tuple[int, int]:
        high, wide = resolution
        scale = min(wide / width, high / height)
        left = min(int(width * scale) * int(height * scale), width * height)
        return -left, high * wide - left

    return min(resolutions, key=fit)


def scaled(width: int, height: int, resolution: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in pixels of a picture that fills a resolution (height, width) in one direction."""
    high, wide = resolution
    by_width, by_height = wide / width, high / height
    if by_width < by_height:
        return wide, min(math.ceil(height * by_width), high)
    return min(math.ceil(width * by_height), wide), high


def largest(vision: VisionConfig, max_images: int) -> tuple[Picture, ...]:
    """The pictures of a sample with most visual tokens, of those without padding: for these plans are made.

    A padded picture between two resolutions may have a few tokens more, if ``anyres_max`` does not shrink it.
    """
    assert vision.tiles is not None
    whole = [tiled(wide, high, vision) for high, wide in vision.tiles.resolutions]
    one = max(whole, key=lambda picture: (picture.num_tokens, -picture.num_views))
    if vision.tiles.several == "tiles" or max_images == 1:
        return (one,) * max_images
    squares = tuple(square(number, vision) for number in range(max_images))
    return max((one,), squares, key=lambda pictures: sum(picture.num_tokens for picture in pictures))


def mask(block: Block, vtc: VtcConfig | None, ratios: Sequence[float]) -> Mask:
    """Which tokens of a block stay, bool [rows_out, columns_out]; with ``sampler: random`` only how many of each row.

    uniform: the evenly spaced tokens of each tile (``uniform_tokens``), as far as the picture shows them.
    """
    shape = block.rows_out, block.columns_out
    if vtc is None or (ratio := ratios[min(block.ratio, len(ratios) - 1)]) == 1:
        return np.ones(shape, dtype=np.bool_)
    if vtc.sampler == "random":
        ends = (
            np.arange(shape[1] + 1)
            * row_shares(max(1, kept_tokens(vtc, ratio, math.prod(shape), 1)), shape[0])[:, None]
        )
        return np.diff(ends // shape[1]) > 0
    is_view = block.columns == 1 and shape[0] == shape[1]
    side = shape[0] if is_view else block.side
    cells = np.zeros(side * side, dtype=np.bool_)
    cells[list(uniform_tokens(side * side, max(1, kept_tokens(vtc, ratio, side * side, 1))))] = True
    top, left = (0, 0) if block.is_interpolated else (block.top, block.left)
    repeats = (-(-(top + shape[0]) // side), -(-(left + shape[1]) // side))
    return np.tile(cells.reshape(side, side), repeats)[top : top + shape[0], left : left + shape[1]]


def row_shares(num_kept: int, num_rows: int) -> NDArray[np.int64]:
    """``num_kept`` in ``num_rows`` parts that differ by one at most, spread evenly; int64 [num_rows]."""
    ends = np.arange(num_rows + 1) * num_kept // num_rows
    return np.diff(ends)


@lru_cache(maxsize=4096)
def kept_counts(picture: Picture, vtc: VtcConfig | None, ratios: tuple[float, ...]) -> tuple[int, tuple[int, ...]]:
    """A picture's tokens after VTC, newline tokens included, and of each view how many patches' features are projected for them: about,
    where they are drawn at random, but as many in all, unless interpolated tokens share them."""
    masks = [mask(block, vtc, ratios) for block in picture.blocks]
    pairs = list(zip(picture.blocks, masks, strict=True))
    newlines = sum(int(kept.any(axis=1).sum()) for block, kept in pairs if block.has_newlines)
    by_view = sum(_projected_by_view(block, kept, picture.num_views) for block, kept in pairs)
    num_kept = sum(int(kept.sum()) for kept in masks) + newlines + picture.ends_with_newline
    return num_kept, tuple(np.atleast_1d(by_view).tolist())


def neighbours(length: int, num_out: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Linear interpolation of ``length`` values to ``num_out``: for each output the two it lies between, and the second's weight.

    As torch's with ``align_corners=False``. With num_out < length the first ones of all outputs are distinct, and so are the second.
    """
    if length == num_out:
        same = np.arange(length)
        return same, same, np.zeros(length, dtype=np.float32)
    step = np.float32(length) / np.float32(num_out)
    places = np.maximum(
        step * (np.arange(num_out, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5), np.float32(0)
    )
    first = places.astype(np.int64)
    return first, np.minimum(first + 1, length - 1), places - first.astype(np.float32)


def _projected_by_view(block: Block, kept: Mask, num_views: int) -> NDArray[np.int64]:
    seen = kept
    if block.is_interpolated:
        seen = np.zeros((block.height, block.width), dtype=np.bool_)
        rows, columns = np.nonzero(kept)
        both = product(neighbours(block.height, block.rows_out)[:2], neighbours(block.width, block.columns_out)[:2])
        for down, right in both:
            seen[down[rows], right[columns]] = True
    rows, columns = np.nonzero(seen)
    views = (rows + block.top) // block.side * block.columns + (columns + block.left) // block.side
    return np.bincount(block.first_view + views, minlength=num_views)


def _whole_view(side: int, first_view: int, ratio: int) -> Block:
    return Block(
        first_view=first_view, side=side, height=side, width=side, rows_out=side, columns_out=side, ratio=ratio
    )


def _padding(width: int, height: int, rows: int, columns: int) -> tuple[int, int]:
    """Rows above (and below), and columns left (and right), of a mosaic of rows x columns that show padding alone."""
    if width / height > columns / rows:
        return (rows - int(round(height * (columns / width), 7))) // 2, 0
    return 0, (columns - int(round(width * (rows / height), 7))) // 2


def _shrunk(height: int, width: int, side: int, tiles: TilesConfig) -> tuple[int, int]:
    if tiles.anyres_max is None:
        return height, width
    ratio = math.sqrt(height * width / (tiles.anyres_max * side**2))
    return (int(height // ratio), int(width // ratio)) if ratio > SHRINKS_ABOVE else (height, width)
