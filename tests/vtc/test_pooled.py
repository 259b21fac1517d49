"""Average pooling against torch's, its gradient, its grids and positions."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from megatron_sts.config.pooling import pooled_grid
from megatron_sts.vtc.pooled import pool, pooled_tokens

wanted_counts = st.integers(1, 24).flatmap(lambda side: st.tuples(st.just(side), st.integers(1, side * side)))


def tokens(side: int, width: int = 5, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, side * side, width, generator=torch.Generator().manual_seed(side), dtype=torch.float64).to(
        dtype
    )


def as_grid(visual: torch.Tensor, side: int) -> torch.Tensor:
    return visual.mT.unflatten(2, (side, side))


@pytest.mark.parametrize(("side", "stride"), [(8, 2), (12, 2), (12, 3), (24, 4), (6, 6)])
def test_a_whole_stride_is_plain_average_pooling(side: int, stride: int) -> None:
    x = tokens(side)
    expected = F.avg_pool2d(as_grid(x, side), stride).flatten(2).mT
    # float64 sums of <= 36 terms of size ~1, in another order.
    torch.testing.assert_close(pool(x, (side // stride) ** 2), expected, rtol=1e-12, atol=1e-14)


@given(wanted_counts)
def test_any_grid_is_adaptive_average_pooling(counts: tuple[int, int]) -> None:
    side, wanted = counts
    rows, columns = pooled_grid(side * side, wanted)
    x = tokens(side)
    expected = F.adaptive_avg_pool2d(as_grid(x, side), (rows, columns)).flatten(2).mT
    torch.testing.assert_close(pool(x, rows * columns), expected, rtol=1e-12, atol=1e-14)


def test_gradients() -> None:
    x = tokens(5).requires_grad_()
    assert torch.autograd.gradcheck(lambda visual: pool(visual, 12), (x,))


def test_keeping_all_returns_the_same_object() -> None:
    x = tokens(5)
    assert pool(x, 25) is x


def test_low_precision_is_summed_in_fp32() -> None:
    x = tokens(24, dtype=torch.bfloat16)
    assert torch.equal(pool(x, 64), pool(x.float(), 64).bfloat16())


@given(wanted_counts)
def test_the_grid_is_the_nearest_of_the_nearly_square(counts: tuple[int, int]) -> None:
    side, wanted = counts
    rows, columns = pooled_grid(side * side, wanted)
    assert 1 <= rows <= columns <= min(side, rows + 1)
    distances = [abs(r * c - wanted) for r in range(1, side + 1) for c in range(r, min(r + 1, side) + 1)]
    assert abs(rows * columns - wanted) == min(distances) <= max(columns, 2) / 2


@pytest.mark.parametrize(("wanted", "grid"), [(288, (17, 17)), (144, (12, 12)), (5, (2, 2)), (576, (24, 24))])
def test_grids_of_576_tokens(wanted: int, grid: tuple[int, int]) -> None:
    assert pooled_grid(576, wanted) == grid


@given(wanted_counts)
def test_each_position_lies_in_the_middle_of_its_cell(counts: tuple[int, int]) -> None:
    side, wanted = counts
    rows, columns = pooled_grid(side * side, wanted)
    positions = np.array(pooled_tokens(side * side, rows * columns))
    assert (np.diff(positions) > 0).all()
    # The tokens that a pooled one averages are those its gradient reaches.
    x = tokens(side, width=1).requires_grad_()
    for number in {0, rows * columns // 2, rows * columns - 1}:
        [gradient] = torch.autograd.grad(pool(x, rows * columns)[0, number, 0], x)
        covered = np.argwhere(gradient[0, :, 0].reshape(side, side).numpy())
        middle = (covered.min(0) + covered.max(0)) // 2
        assert positions[number] == middle[0] * side + middle[1]


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="average pooling cannot keep 7 of 64 tokens; use 6"):
        pool(tokens(8), 7)
    with pytest.raises(ValueError, match="60 visual tokens form no square grid"):
        pooled_grid(60, 30)
    with pytest.raises(ValueError, match="cannot keep 0 of 64 visual tokens"):
        pooled_grid(64, 0)
