"""Whether boxes cover a tensor, each element once: what a checkpoint's parts must do.

torch compares each box with all that share its interval of the longest axis. Where data-parallel ranks cut another axis than
tensor-parallel ones, and layers lie on a third, those are thousands, and it takes minutes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import combinations

Part = tuple[Sequence[int], Sequence[int]]
"""Offsets and sizes of a box."""


def fault(shape: Sequence[int], parts: Sequence[Part]) -> str | None:
    """Why the parts do not cover a tensor of this shape exactly; None: they do."""
    for offsets, sizes in parts:
        if any(at < 0 or n < 0 or at + n > whole for at, n, whole in zip(offsets, sizes, shape, strict=True)):
            return f"a part at {list(offsets)} of {list(sizes)} lies outside of {list(shape)}"
    if twice := _overlap(parts):
        return f"the parts at {list(twice[0][0])} and {list(twice[1][0])} overlap"
    held, whole = sum(math.prod(sizes) for _, sizes in parts), math.prod(shape)
    return None if held == whole else f"its parts hold {held} of {whole} elements"


def _overlap(parts: Sequence[Part]) -> tuple[Part, Part] | None:
    """Two that overlap, if any do: parts that a plane separates do not, so only those on one side of it are compared."""
    if len(parts) < 2:
        return None
    axes = range(len(parts[0][0]))
    starts = {axis: len({offsets[axis] for offsets, _ in parts}) for axis in axes}
    for axis in sorted(axes, key=lambda axis: -starts[axis]):
        apart = list(_separated(parts, axis))
        if len(apart) > 1:
            return next((found for side in apart if (found := _overlap(side)) is not None), None)
    return next((pair for pair in combinations(parts, 2) if _share(*pair)), None)


def _separated(parts: Sequence[Part], axis: int) -> Iterator[list[Part]]:
    """The parts by the planes across ``axis`` that cut none of them."""
    side: list[Part] = []
    end = 0
    for part in sorted(parts, key=lambda part: part[0][axis]):
        at = part[0][axis]
        if side and at >= end:
            yield side
            side = []
        side.append(part)
        end = max(end, at + part[1][axis])
    yield side


def _share(one: Part, other: Part) -> bool:
    return all(a < b + m and b < a + n for a, n, b, m in zip(*one, *other, strict=True))
