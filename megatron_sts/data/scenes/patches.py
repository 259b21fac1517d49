"""Which patch of the picture shows what: targets for pretraining a vision encoder, and the layout of text maps."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_sts.data.scenes.catalog import load_catalog
from megatron_sts.data.scenes.scene import DIGIT_PX, DIGIT_STEP_PX, IMAGE_PX, Scene

PATCH_PX = 8
PATCHES = IMAGE_PX // PATCH_PX
"""Patches along one side."""


def num_patch_classes() -> int:
    """Background, every sprite, ten digits."""
    return 1 + len(load_catalog()) + 10


def patch_labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Class of each patch, int64 ``[PATCHES * PATCHES]`` row-major, in two variants.

    Class 0 is background, ``1 + sprite`` an object, ``1 + num_sprites + digit`` a digit. ``centre`` marks only the patch
    that holds an item's centre; ``coverage`` marks every patch whose own centre the item covers.
    """
    centre = np.zeros((PATCHES, PATCHES), np.int64)
    coverage = np.zeros((PATCHES, PATCHES), np.int64)
    for label, top, left, height, width in _boxes(scene):
        rows, columns = _covered(top, height), _covered(left, width)
        coverage[rows, columns] = label
        centre[(top + height // 2) // PATCH_PX, (left + width // 2) // PATCH_PX] = label
    return centre.ravel(), coverage.ravel()


def _boxes(scene: Scene) -> Iterator[tuple[int, int, int, int, int]]:
    """(class, top, left, height, width) of each item, in pixels."""
    for placed in scene.objects:
        yield 1 + placed.sprite, placed.top, placed.left, placed.size, placed.size
    if scene.number:
        for i, digit in enumerate(scene.number.digits):
            left = scene.number.left + i * DIGIT_STEP_PX
            yield 1 + len(load_catalog()) + digit, scene.number.top, left, DIGIT_PX[0], DIGIT_PX[1]


def _covered(start: int, length: int) -> slice:
    """Patches along one axis whose centre lies in ``[start, start + length)``."""
    half = PATCH_PX // 2
    return slice(-(-(start - half) // PATCH_PX), -(-(start + length - half) // PATCH_PX))
