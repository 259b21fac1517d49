"""Average pooling on the 2-D grid: fewer tokens, each the mean of an area. The one compressor that selects nothing.

Source: LLaVolta (Chen et al. 2024, arXiv 2406.20092), whose Visual Context Compressor averages neighbouring visual tokens.
"""

from __future__ import annotations

from math import isqrt

import torch

from megatron_sts.config.pooling import pooled_grid


def pool(visual: torch.Tensor, num_kept: int) -> torch.Tensor:
    """Adaptive average pooling: ``visual`` [n, t, h], row-major on a square grid, to [n, num_kept, h]; differentiable.

    Output cell i of r covers input rows floor(i g/r) to ceil((i+1) g/r), columns alike (torch's adaptive pooling; cells
    overlap where the grid does not divide). Written as two matrix products, because torch's own backward is not
    deterministic on CUDA. Sums in at least fp32. With num_kept = t it is ``visual`` itself.

    Raises:
        ValueError: ``num_kept`` is not a count that ``pooled_grid`` gives.
    """
    num_images, num_tokens_in, width = visual.shape
    if num_kept == num_tokens_in:
        return visual
    side = isqrt(num_tokens_in)
    dtype = torch.promote_types(visual.dtype, torch.float32)
    over_rows, over_columns = (
        _averages(side, cells).to(visual.device, dtype) for cells in _grid(num_tokens_in, num_kept)
    )
    grid = visual.to(dtype).view(num_images, side, side * width)
    grid = (over_rows @ grid).view(num_images, len(over_rows), side, width)
    return (over_columns @ grid).flatten(1, 2).to(visual.dtype)


def pooled_tokens(num_tokens_in: int, num_kept: int) -> tuple[int, ...]:
    """The position of each pooled token: the index of its cell's centre token (the earlier of two), distinct and ascending.

    Raises:
        ValueError: ``num_kept`` is not a count that ``pooled_grid`` gives.
    """
    side = isqrt(num_tokens_in)
    rows, columns = (
        [(start + end - 1) // 2 for start, end in _cells(side, cells)] for cells in _grid(num_tokens_in, num_kept)
    )
    return tuple(row * side + column for row in rows for column in columns)


def _grid(num_tokens_in: int, num_kept: int) -> tuple[int, int]:
    rows, columns = pooled_grid(num_tokens_in, num_kept)
    if rows * columns != num_kept:
        raise ValueError(f"average pooling cannot keep {num_kept} of {num_tokens_in} tokens; use {rows * columns}")
    return rows, columns


def _averages(side: int, num_cells: int) -> torch.Tensor:
    """Each row averages one cell, float64 [num_cells, side]."""
    weights = torch.zeros(num_cells, side, dtype=torch.float64)
    for row, (start, end) in zip(weights, _cells(side, num_cells), strict=True):
        row[start:end] = 1 / (end - start)
    return weights


def _cells(side: int, num_cells: int) -> list[tuple[int, int]]:
    """[start, end) of each cell along one side."""
    return [(i * side // num_cells, -(-(i + 1) * side // num_cells)) for i in range(num_cells)]
