"""How many tokens a step's samples have, with and without VTC: the one place of this rule. Torch-free."""

from __future__ import annotations

import math
from fractions import Fraction

from megatron_sts.config.pooling import pooled_grid
from megatron_sts.config.schema import VtcConfig
from megatron_sts.config.section import Section

BEFORE_PROJECTOR = ("uniform", "random")
"""Samplers that need not see what they choose from, so that the projector computes what is kept only."""
LOOKING = ("guided", "anchored")
"""Samplers that choose by what the projected tokens show: only the first pipeline stage knows what."""


class TokenCounts(Section):
    """The static shape of a step's samples."""

    visual_tokens_out: tuple[int, ...]
    """Kept tokens of a sample's first, second, ... image; the last number counts for all further ones."""
    sequence_length: int
    """Tokens of a row, padding included."""
    projected_tokens: tuple[int, ...] = ()
    """Tiles: of each view of the images for which plans are made, the features that are projected; ``visual_tokens_out`` is of these
    images too."""
    keep_ratios: tuple[float, ...] = ()
    """Tiles: shares of their tokens that overview, tiles and frames keep (``config.tiles``)."""

    def of_image(self, number: int) -> int:
        """Kept tokens of a sample's image ``number`` (0-based)."""
        return self.visual_tokens_out[min(number, len(self.visual_tokens_out) - 1)]


def keep_ratios(vtc: VtcConfig, step: int, num_steps: int) -> tuple[float, ...]:
    """Shares of an image's tokens that ``step`` keeps, by the image's number in its sample.

    With x = step / num_steps and the ends a = keep_ratio, b = final_keep_ratio: linear a + (b - a) x, cosine
    b + (a - b) (1 + cos(pi x)) / 2, piecewise straight lines between ``schedule_points``. A full step keeps all.
    """
    if is_full_step(vtc, step):
        return (1.0,)
    if vtc.keep_ratio_by_image:
        return vtc.keep_ratio_by_image
    x, first, last = step / num_steps, vtc.keep_ratio, vtc.final_keep_ratio
    if vtc.schedule == "linear" and last is not None:
        return (first + (last - first) * x,)
    if vtc.schedule == "cosine" and last is not None:
        return (last + (first - last) * (1 + math.cos(math.pi * x)) / 2,)
    if vtc.schedule == "piecewise":
        return (_on_lines(vtc.schedule_points, x),)
    return (first,)


def is_full_step(vtc: VtcConfig, step: int) -> bool:
    """Whether the step sees all tokens: every ``full_every``-th one, the share ``full_fraction`` spread evenly."""
    if vtc.full_every is not None:
        return step % vtc.full_every == vtc.full_every - 1
    fraction = exact(vtc.full_fraction)
    return math.floor((step + 1) * fraction) > math.floor(step * fraction)


def least_keep_ratio(vtc: VtcConfig) -> float:
    """The smallest share of an image's tokens that any step keeps."""
    if vtc.keep_ratio_by_image:
        return min(vtc.keep_ratio_by_image)
    if vtc.schedule == "piecewise":
        return min(ratio for _, ratio in vtc.schedule_points)
    return min(vtc.keep_ratio, vtc.keep_ratio if vtc.final_keep_ratio is None else vtc.final_keep_ratio)


def kept_tokens(vtc: VtcConfig, keep_ratio: float, tokens_in: int, multiple: int) -> int:
    """keep_ratio x tokens, rounded half up in exact decimal arithmetic, then as the sampler needs.

    Those that choose before the projector keep a multiple (of the rows that FP8 needs there), or all; ``pooled`` keeps
    the nearest grid.
    """
    kept = math.floor(exact(keep_ratio) * tokens_in + Fraction(1, 2))
    if vtc.sampler == "pooled" and kept:
        return math.prod(pooled_grid(tokens_in, kept))
    return min(round_up(kept, multiple), tokens_in) if vtc.sampler in BEFORE_PROJECTOR else kept


def exact(value: float) -> Fraction:
    """The number as the user wrote it: 0.29 is 29/100, not the nearest binary float."""
    return Fraction(repr(value))


def round_up(value: int, multiple: int) -> int:
    """The next multiple."""
    return -(-value // multiple) * multiple


def _on_lines(points: tuple[tuple[float, float], ...], x: float) -> float:
    """The value at x of straight lines between points of rising x, held before the first and after the last."""
    before = [point for point in points if point[0] <= x]
    after = [point for point in points if point[0] > x]
    if not before or not after:
        return points[0][1] if not before else points[-1][1]
    (x0, y0), (x1, y1) = before[-1], after[0]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
