"""Tokens of a picture in tiles, of several views or of a clip: which stay, and of which features each is made. NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.schema import VtcConfig
from megatron_sts.config.tiles import Block, Mask, Picture, mask, neighbours
from megatron_sts.vtc.samplers import STREAM, ImageKey

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Arrangement:
    """A picture's visual tokens, in reading order: k of them, f made of features, the others newlines."""

    picture: Picture
    places: Integers
    """[k]: where they stand among all that the picture has without VTC, ascending."""
    is_newline: NDArray[np.bool_]
    """[k]"""
    sources: Integers
    """[c, f]: features, as indices into the picture's views x t, that each token but newlines is made of; c is 1, or 4 with
    interpolation. Within one of the c rows they are distinct."""
    weights: NDArray[np.float32] | None
    """[c, f]; None: each token is its one source."""

    @property
    def num_projected(self) -> int:
        """Features that are needed."""
        return len(np.unique(self.sources))


def arrange(
    picture: Picture, vtc: VtcConfig | None, ratios: Sequence[float], draw: tuple[int, int, ImageKey]
) -> Arrangement:
    """The tokens that stay when blocks keep shares ``ratios`` of theirs (``config.tiles.mask``).

    A newline stays for each row that keeps a token, and so does the one at the picture's end.

    Args:
        picture: what it becomes without VTC.
        vtc: None: all stay.
        ratios: of the first, second, ... block; the last one counts for all further.
        draw: ``sampler: random``: seed, stage and the picture's key, of which its draws are a pure function.
    """
    parts, offset = [], 0
    for number, block in enumerate(picture.blocks):
        kept = mask(block, vtc, ratios)
        if vtc is not None and vtc.sampler == "random" and not kept.all():
            kept = _drawn(kept, draw, number)
        parts.append(_block(block, kept, offset))
        offset += block.rows_out * (block.columns_out + block.has_newlines)
    places, newlines = (np.concatenate(found) for found in zip(*(part[:2] for part in parts), strict=True))
    if picture.ends_with_newline:
        places, newlines = np.append(places, offset), np.append(newlines, True)
    if not any(block.is_interpolated for block in picture.blocks):
        return Arrangement(picture, places, newlines, np.concatenate([part[2][:1] for part in parts], axis=1), None)
    sources, weights = (np.concatenate([part[n] for part in parts], axis=1) for n in (2, 3))
    return Arrangement(picture, places, newlines, sources, weights)


@dataclass(frozen=True)
class Joined:
    """Arrangements of several pictures: f tokens beside newlines, made of p of all their features."""

    features: Integers
    """[p]: the needed ones, as indices into all pictures' views x t, ascending."""
    sources: Integers
    """[c, f]: indices into ``features``; as in ``Arrangement``."""
    weights: NDArray[np.float32] | None
    """[c, f]"""
    is_newline: NDArray[np.bool_]
    """Of all tokens."""


def join_arrangements(arrangements: Sequence[Arrangement], view_tokens: int) -> Joined:
    """Those of a micro-batch's pictures, in order; ``view_tokens``: features of a view."""
    is_mixed, first = any(one.weights is not None for one in arrangements), 0
    sources, weights = [], []
    for one in arrangements:
        # Beside interpolated tokens others are four times their source, of which one counts.
        repeats = 4 // len(one.sources) if is_mixed else 1
        sources.append(np.tile(one.sources + first, (repeats, 1)))
        alone = np.zeros((4, one.sources.shape[1]), dtype=np.float32)
        alone[0] = 1
        weights.append(alone if one.weights is None else one.weights)
        first += one.picture.num_views * view_tokens
    features, places = np.unique(np.concatenate(sources, axis=1), return_inverse=True)
    return Joined(
        features,
        places.reshape(4 if is_mixed else 1, -1),
        np.concatenate(weights, axis=1) if is_mixed else None,
        np.concatenate([one.is_newline for one in arrangements]),
    )


def _block(block: Block, kept: Mask, offset: int) -> tuple[Integers, NDArray[np.bool_], Integers, NDArray[np.float32]]:
    """``places``, ``is_newline``, and of the four sources of each token indices and weights."""
    stays = np.column_stack([kept, kept.any(axis=1)]) if block.has_newlines else kept
    places = np.flatnonzero(stays)
    is_newline = places % stays.shape[1] == block.columns_out
    rows, columns = np.nonzero(kept)
    first_rows, second_rows, weights_down = neighbours(block.height, block.rows_out)
    first_columns, second_columns, weights_right = neighbours(block.width, block.columns_out)
    above, below, down = first_rows[rows], second_rows[rows], weights_down[rows]
    before, behind, right = first_columns[columns], second_columns[columns], weights_right[columns]
    corners = [(above, before), (above, behind), (below, before), (below, behind)]
    sources = np.stack([_features(block, row, column) for row, column in corners])
    weights = np.stack([(1 - down) * (1 - right), (1 - down) * right, down * (1 - right), down * right])
    return places + offset, is_newline, sources, weights


def _features(block: Block, rows: Integers, columns: Integers) -> Integers:
    """Patches of a block's visible rectangle as indices into the picture's views x t."""
    rows, columns, side = rows + block.top, columns + block.left, block.side
    views = block.first_view + rows // side * block.columns + columns // side
    patches: Integers = (views * side + rows % side) * side + columns % side
    return patches


def _drawn(kept: Mask, draw: tuple[int, int, ImageKey], number: int) -> Mask:
    """As many tokens of each row as ``kept`` has, each of them as likely as any other of its row.

    As ``RandomSampler``, with the block's number from 1 on in the upper half of the first counter word: Philox counts draws in the
    lower one, and blocks with numbers next to each other there would have each other's draws, shifted by four tokens.
    """
    seed, stage, (sample_index, image_number) = draw
    philox = np.random.Philox(key=[seed, stage], counter=[number + 1 << 32, sample_index, image_number, STREAM])
    order = philox.random_raw(kept.size).reshape(kept.shape).argsort(axis=1, kind="stable")
    found = np.zeros_like(kept)
    np.put_along_axis(found, order, kept, axis=1)
    return found
