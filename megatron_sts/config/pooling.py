"""The grid that average pooling leaves of an image's tokens. Torch-free: the resolved token counts follow from it."""

from __future__ import annotations

from math import isqrt


def pooled_grid(num_tokens_in: int, wanted: int) -> tuple[int, int]:
    """(rows, columns) whose product is nearest to ``wanted`` among r x r and r x (r + 1) inside the input's square grid.

    Nearly square, so that a pooled token stands for a nearly square area; the wider of the two directions is the one in
    which text runs. A tie goes to fewer tokens. At most half a row away from ``wanted``.

    Raises:
        ValueError: the tokens form no square grid, or so many cannot be kept.
    """
    side = isqrt(num_tokens_in)
    if side * side != num_tokens_in:
        raise ValueError(f"{num_tokens_in} visual tokens form no square grid, which average pooling needs")
    if not 0 < wanted <= num_tokens_in:
        raise ValueError(f"cannot keep {wanted} of {num_tokens_in} visual tokens")
    grids = [(rows, columns) for rows in range(1, side + 1) for columns in (rows, rows + 1) if columns <= side]
    return min(grids, key=lambda grid: (abs(grid[0] * grid[1] - wanted), grid))
