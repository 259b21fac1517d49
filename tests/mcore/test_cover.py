"""Boxes that cover a tensor exactly, and such that do not, beside counting every element."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_sts.mcore.cover import Part, fault


def cut(shape: tuple[int, ...], data: st.DataObject) -> list[Part]:
    """A random exact cover: any box is cut in two again and again."""
    parts: list[Part] = [((0,) * len(shape), shape)]
    for _ in range(data.draw(st.integers(0, 8))):
        offsets, sizes = parts.pop(data.draw(st.integers(0, len(parts) - 1)))
        axis = data.draw(st.integers(0, len(shape) - 1))
        at = data.draw(st.integers(0, sizes[axis]))
        low, high, moved = list(sizes), list(sizes), list(offsets)
        low[axis], high[axis], moved[axis] = at, sizes[axis] - at, offsets[axis] + at
        parts += [part for part in ((offsets, tuple(low)), (tuple(moved), tuple(high))) if all(part[1])]
    return parts


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), st.data())
def test_as_counting_says(shape: tuple[int, ...], data: st.DataObject) -> None:
    parts = cut(shape, data)
    assert fault(shape, parts) is None
    number = data.draw(st.integers(0, len(parts) - 1))
    offsets, sizes = parts[number]
    axis, by = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.sampled_from([-1, 1]))
    moved = (tuple(at + by * (a == axis) for a, at in enumerate(offsets)), sizes)
    assert fault(shape, [*parts[:number], moved, *parts[number + 1 :]]) is not None
    assert "overlap" in str(fault(shape, [*parts, parts[number]]))
    assert f"of {np.prod(shape)} elements" in str(fault(shape, parts[:number] + parts[number + 1 :]))


def test_a_pinwheel_that_no_plane_separates() -> None:
    wheel: list[Part] = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    assert fault((3, 3), wheel) is None
    assert "overlap" in str(fault((3, 3), [*wheel[:-1], ((1, 1), (1, 2))]))
