"""Evenly spaced tokens of an image's grid. Pure integers, no torch, so that every machine chooses alike."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise, product
from math import gcd, isqrt

import numpy as np
from numpy.typing import NDArray

Cells = NDArray[np.bool_]
"""Chosen cells of a grid, [side, side]."""


@lru_cache(maxsize=1024)
def uniform_tokens(num_tokens_in: int, num_tokens_out: int) -> tuple[int, ...]:
    """Evenly spaced tokens of a row-major square grid (of a line, if ``num_tokens_in`` is no square), ascending.

    Even means that no dropped token is far from a kept one: the farthest is at most as far as in the best of staggered
    rows (see ``_staggered``). Half the tokens of an even grid are a checkerboard. Above one half it is the dropped tokens
    that are spread.

    Raises:
        ValueError: not between one token and all.
    """
    check_counts(num_tokens_in, num_tokens_out)
    side, num_dropped = isqrt(num_tokens_in), num_tokens_in - num_tokens_out
    if side * side != num_tokens_in:
        return tuple((2 * j + 1) * num_tokens_in // (2 * num_tokens_out) for j in range(num_tokens_out))
    kept = (
        ~min(_lattices(side, num_dropped), key=_crowding)
        if num_tokens_out > num_dropped
        else _spread(side, num_tokens_out)
    )
    return tuple(np.flatnonzero(kept).tolist())


def check_counts(num_tokens_in: int, num_tokens_out: int) -> None:
    """Refuses to keep none, or more than there are.

    Raises:
        ValueError: it is so.
    """
    if not 0 < num_tokens_out <= num_tokens_in:
        raise ValueError(f"cannot keep {num_tokens_out} of {num_tokens_in} visual tokens")


def _spread(side: int, count: int) -> Cells:
    """``count`` <= side^2/2 cells: a lattice, which gives each row and column its share, unless rows are more even.

    A lattice is even on a torus; on the square, one with few cells leaves corners and edges empty.
    """
    lattice = min(_lattices(side, count), key=lambda cells: (_emptiness(cells)[0], _crowding(cells)))
    rows = min(_staggered(side, count), key=_emptiness)
    return lattice if _emptiness(lattice)[0] <= _emptiness(rows)[0] else rows


def _emptiness(cells: Cells) -> tuple[int, int]:
    """The largest and the summed squared distance from a cell to its nearest chosen one."""
    side, [rows] = len(cells), np.nonzero(cells.any(axis=1))
    squared = np.subtract.outer(np.arange(side), np.arange(side)) ** 2
    along_rows = np.where(cells[rows, None, :], squared, 2 * side * side).min(axis=2)  # [row, column]
    nearest = (squared[:, rows, None] + along_rows).min(axis=1)
    return int(nearest.max()), int(nearest.sum())


def _staggered(side: int, count: int) -> Iterator[Cells]:
    """Rows of equally many cells, give or take one, evenly spaced; most rows first.

    Rows stand in the middle of equal strips, or reach both edges; the longer ones are spread over the grid. A row's first
    cell is 0, 1/4, 1/2 or 3/4 of a step from the edge; every other row is shifted by half a step, or all are centred.
    """
    for num_rows in range(min(side, count), 0, -1):
        if count > num_rows * side:
            return
        places = dict.fromkeys((_middles(side, num_rows), _edge_to_edge(side, num_rows)))
        lengths = dict.fromkeys(_lengths(count, num_rows, offset) for offset in (0, num_rows // 2, num_rows - 1))
        for rows, columns, (even, odd) in product(places, lengths, ((0, 2), (1, 3), (2, 0), (3, 1), (2, 2))):
            cells = np.zeros((side, side), dtype=np.bool_)
            for number, (row, length) in enumerate(zip(rows, columns, strict=True)):
                quarters = odd if number % 2 else even
                cells[row, [(4 * j + quarters) * side // (4 * length) for j in range(length)]] = True
            yield cells


def _middles(side: int, num_rows: int) -> tuple[int, ...]:
    return tuple((2 * i + 1) * side // (2 * num_rows) for i in range(num_rows))


def _edge_to_edge(side: int, num_rows: int) -> tuple[int, ...]:
    gaps = num_rows - 1
    return tuple((2 * i * (side - 1) + gaps) // (2 * gaps) for i in range(num_rows)) if gaps else ((side - 1) // 2,)


def _lengths(count: int, num_rows: int, offset: int) -> tuple[int, ...]:
    """``count`` in ``num_rows`` parts that differ by one at most; ``offset`` in [0, num_rows) says where the longer are."""
    ends = [(i * count + offset) // num_rows for i in range(num_rows + 1)]
    return tuple(end - begin for begin, end in pairwise(ends))


def _lattices(side: int, count: int) -> list[Cells]:
    """``count`` <= side^2/2 cells, the patterns with each possible slope.

    A stride in the flat sequence would resonate with the row width (stride 2 on an even width keeps whole columns). Here
    every row and every column keeps floor(count/side) or ceil(count/side) cells.
    """
    return [_diagonals(side, count, slope) for slope in range(1, side + 1) if gcd(slope, side) == 1]


def _diagonals(side: int, count: int, slope: int) -> Cells:
    """Cells on evenly spaced diagonals (column + slope * row) mod side.

    With a slope coprime to the side a diagonal meets each row and each column once. ``count`` makes so many whole
    diagonals; the rest lies on one more, midway in the widest gap, in evenly spaced rows.
    """
    num_whole, num_rest = divmod(count, side)
    row = np.arange(side)[:, None]
    diagonal: NDArray[np.int64] = (np.arange(side)[None, :] + slope * row) % side
    starts = [i * side // max(num_whole, 1) for i in range(max(num_whole, 1))]
    width, start = max((after - before, before) for before, after in pairwise([*starts, side]))
    rest_rows = [i * side // num_rest for i in range(num_rest)]
    rest: Cells = (diagonal == start + width // 2) & np.isin(row, rest_rows)
    return np.isin(diagonal, starts[:num_whole]) | rest


def _crowding(cells: Cells) -> tuple[int, ...]:
    """Number of pairs of cells at each squared distance on the torus, nearest first; smaller is more even.

    Integers, so that ties are exact and every machine settles them alike.
    """
    side = len(cells)
    spectrum = np.fft.fft2(cells)
    pairs = np.rint(np.fft.ifft2(spectrum * spectrum.conj()).real).astype(np.int64)
    offset = np.minimum(np.arange(side), side - np.arange(side)) ** 2
    squared_distance = offset[:, None] + offset[None, :]
    return tuple(np.bincount(squared_distance.ravel(), weights=pairs.ravel()).astype(np.int64).tolist())
