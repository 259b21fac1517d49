"""Evenness of uniform tokens: on the square, edges and corners included, beside rows that anyone would draw."""

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from megatron_sts.config.uniform import uniform_tokens

TOLERANCE = 1.3
"""How much farther than in the reference the farthest dropped token may lie."""


def picture(side: int, num_kept: int) -> NDArray[np.int64]:
    kept = np.zeros(side * side, dtype=np.int64)
    kept[list(uniform_tokens(side * side, num_kept))] = 1
    return kept.reshape(side, side)


def farthest(side: int, rows: Iterable[tuple[int, list[int]]]) -> float:
    """From a token of the grid to the nearest of those at (row, columns)."""
    place, nearest = np.arange(side), np.full((side, side), np.inf)
    for row, columns in rows:
        beside = np.abs(np.subtract.outer(place, columns)).min(axis=1)
        nearest = np.minimum(nearest, np.hypot((place - row)[:, None], beside[None, :]))
    return float(nearest.max())


def rows_of(kept: NDArray[np.int64]) -> Iterator[tuple[int, list[int]]]:
    return ((row, np.flatnonzero(line).tolist()) for row, line in enumerate(kept) if line.any())


def staggered(side: int, num_kept: int) -> float:
    """``farthest`` of the best of staggered rows.

    r rows in the middle of r equal strips, of floor(k/r) or ceil(k/r) evenly spaced tokens, every other row shifted by
    half a step: from 1/4 to 3/4 of one, from its middle to its edge, or the other way round. The best r and the best of
    the three.
    """
    found = []
    for num_rows in range(1, min(side, num_kept) + 1):
        if -(-num_kept // num_rows) > side:
            continue
        middles = np.floor((np.arange(num_rows) + 0.5) * side / num_rows).astype(int).tolist()
        lengths = np.diff(np.arange(num_rows + 1) * num_kept // num_rows).tolist()
        for even, odd in ((0.25, 0.75), (0.5, 0.0), (0.0, 0.5)):
            spaced = [
                np.floor((np.arange(n) + (odd if number % 2 else even)) * side / n).astype(int).tolist()
                for number, n in enumerate(lengths)
            ]
            found.append(farthest(side, zip(middles, spaced, strict=True)))
    return min(found)


# All counts of the small grids, some of the large ones: a count of 24 x 24 takes 0.1 s here.
CASES = [
    *((side, range(1, side * side)) for side in (3, 7, 8)),
    *((side, range(1, side * side, 5)) for side in (12, 14, 16)),
    *((24, counts) for counts in ((29, 64, 100), (144, 288, 432))),
    *((side, (side, side * side // 9, side * side // 5)) for side in (27, 32)),
]


@pytest.mark.parametrize(("side", "counts"), CASES)
def test_no_token_is_much_farther_than_in_staggered_rows(side: int, counts: Iterable[int]) -> None:
    found = {count: farthest(side, rows_of(picture(side, count))) / staggered(side, count) for count in counts}
    assert not {count: ratio for count, ratio in found.items() if ratio > TOLERANCE}


@pytest.mark.parametrize(("side", "num_kept", "squared"), [(24, 64, 2), (24, 144, 2), (24, 288, 1), (12, 10, 8)])
def test_the_farthest_dropped_token(side: int, num_kept: int, squared: int) -> None:
    # 64 of 576: the middles of 3 x 3 tokens. A quarter: each 2 x 2 tokens hold one. Half: every neighbour is kept.
    assert farthest(side, rows_of(picture(side, num_kept))) == pytest.approx(squared**0.5)


@pytest.mark.parametrize(("side", "ratio"), [(24, 0.05), (24, 0.1), (12, 0.1), (16, 0.2), (14, 0.3)])
def test_quadrants_keep_alike(side: int, ratio: float) -> None:
    kept, half = picture(side, round(ratio * side * side)), side // 2
    counts = [part.sum() for rows in (kept[:half], kept[half:]) for part in (rows[:, :half], rows[:, half:])]
    # One row or column of tokens more in one half than in the other, where their number is odd.
    assert max(counts) - min(counts) <= np.sqrt(kept.sum()) / 2 + 1


@pytest.mark.parametrize(("side", "ratio"), [(12, 0.25), (12, 0.5), (24, 0.25), (24, 0.5), (24, 0.75), (14, 0.5)])
def test_each_row_and_column_has_its_share_where_that_costs_nothing(side: int, ratio: float) -> None:
    kept = picture(side, round(ratio * side * side))
    for axis in (0, 1):
        share = kept.sum() / side
        assert set(kept.sum(axis).tolist()) <= {int(share), -int(-share // 1)}


def test_a_quarter_of_the_quickstarts_grid_is_the_pattern_that_its_accuracies_were_measured_with() -> None:
    row, column = np.indices((12, 12))
    np.testing.assert_array_equal(picture(12, 36), (row + column) % 4 == 0)


@pytest.mark.parametrize("side", [2, 8, 12, 24])
def test_half_of_an_even_grid_is_a_checkerboard(side: int) -> None:
    row, column = np.indices((side, side))
    np.testing.assert_array_equal(picture(side, side * side // 2), (row + column + 1) % 2)


def test_a_line_is_evenly_spaced() -> None:
    assert uniform_tokens(10, 5) == (1, 3, 5, 7, 9)
    assert uniform_tokens(10, 3) == (1, 5, 8)
