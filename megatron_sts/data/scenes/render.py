"""Paints a scene: sprites and handwriting over a gradient with clutter. Knows no questions and no words."""

from __future__ import annotations

import random
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image

from megatron_sts.data.scenes.catalog import asset
from megatron_sts.data.scenes.scene import (
    CELL_PX,
    DIGIT_PX,
    DIGIT_STEP_PX,
    GRID,
    IMAGE_PX,
    PlacedNumber,
    Scene,
)

Style = Literal["google", "twitter"]
DigitSplit = Literal["train", "train_bent", "test"]
"""``train_bent``: the handwriting of ``train``, and slanted, turned and stretched copies of it."""

SHEET_CELL_PX = 32
SHEET_COLUMNS = 16
PAPER = (0.6, 1.0)
"""Range of a background channel, 0..1; inks below stay clearly darker."""
INK = (0.0, 0.3)
GRADIENT = 0.15
NUM_BENT = 7
"""Bent copies of a digit."""
BEND = 0.2
"""Largest change of a coordinate's coefficients: turn and slant in radians, stretch as a share."""
CLUTTER_PX = (3, 9)
CLUTTER_CONTRAST = 0.12


def render(scene: Scene, style: Style = "google", digits: DigitSplit = "train") -> np.ndarray:
    """The picture of a scene: uint8 ``[64, 64, 3]``, RGB, a pure function of its arguments."""
    rng = random.Random(scene.paint_seed)
    canvas = _background(rng)
    _add_clutter(canvas, scene, rng)
    for placed in scene.objects:
        _blend(canvas, placed.top, placed.left, *_sprite(style, placed.sprite, placed.size))
    if scene.number:
        _write_number(canvas, scene.number, digits, rng)
    return np.rint(canvas.clip(0, 1) * 255).astype(np.uint8)


def _background(rng: random.Random) -> np.ndarray:
    """A bright linear gradient, float32 ``[64, 64, 3]``, 0..1."""
    base = np.array([rng.uniform(*PAPER) for _ in range(3)], np.float32)
    slope = np.array([rng.uniform(-GRADIENT, GRADIENT) for _ in range(3)], np.float32)
    ramp = np.linspace(-0.5, 0.5, IMAGE_PX, dtype=np.float32)
    ramp = ramp[:, None, None] if rng.random() < 0.5 else ramp[None, :, None]
    return np.array(np.broadcast_to(base + slope * ramp, (IMAGE_PX, IMAGE_PX, 3)))


def _add_clutter(canvas: np.ndarray, scene: Scene, rng: random.Random) -> None:
    """Faint rectangles in empty cells."""
    used = {placed.cell for placed in scene.objects} | ({scene.number.cell} if scene.number else set())
    for cell in range(GRID * GRID):
        if cell in used or rng.random() < 0.5:
            continue
        height, width = rng.randint(*CLUTTER_PX), rng.randint(*CLUTTER_PX)
        top = int(cell // GRID * CELL_PX + rng.random() * (CELL_PX - height))
        left = int(cell % GRID * CELL_PX + rng.random() * (CELL_PX - width))
        tint = [rng.uniform(-CLUTTER_CONTRAST, CLUTTER_CONTRAST) for _ in range(3)]
        canvas[top : top + height, left : left + width] += np.array(tint, np.float32)


def _write_number(canvas: np.ndarray, number: PlacedNumber, split: DigitSplit, rng: random.Random) -> None:
    ink = np.array([rng.uniform(*INK) for _ in range(3)], np.float32)
    for i, digit in enumerate(number.digits):
        opacity = rng.choice(_load_digits(split)[digit])
        _blend(canvas, number.top, number.left + i * DIGIT_STEP_PX, ink * opacity, 1 - opacity)


def _blend(canvas: np.ndarray, top: int, left: int, colour: np.ndarray, transparency: np.ndarray) -> None:
    """Lays a premultiplied colour over the canvas. Both ``[h, w, 3]``: one transparency shared by the channels would take thrice as long."""
    view = canvas[top : top + colour.shape[0], left : left + colour.shape[1]]
    view *= transparency
    view += colour


@cache
def _sheet(style: Style) -> Image.Image:
    with asset(f"sprites_{style}.png").open("rb") as file:
        return Image.open(file).convert("RGBA").convert("RGBa")


@cache
def _sprite(style: Style, number: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Premultiplied colour and transparency, float32 ``[side, side, 3]`` each, 0..1."""
    pixels = _pixels(_sheet(style).resize((side, side), Image.Resampling.BOX, box=_sheet_box(number)))
    return pixels[..., :3].copy(), np.repeat(1 - pixels[..., 3:], 3, axis=2)


def _sheet_box(sprite: int) -> tuple[int, int, int, int]:
    row, column = divmod(sprite, SHEET_COLUMNS)
    left, top = column * SHEET_CELL_PX, row * SHEET_CELL_PX
    return left, top, left + SHEET_CELL_PX, top + SHEET_CELL_PX


def _pixels(image: Image.Image) -> np.ndarray:
    """Premultiplied pixels, float32 ``[height, width, 4]``, 0..1."""
    channels = np.frombuffer(image.tobytes(), np.uint8).reshape(image.height, image.width, 4)
    return channels.astype(np.float32) / 255


@cache
def _load_digits(split: DigitSplit) -> list[list[np.ndarray]]:
    """Per digit, its handwritten samples as opacity of each channel, float32 ``[*DIGIT_PX, 3]``, 0..1."""
    with asset("digits.npz").open("rb") as file, np.load(file) as archive:
        images, labels, is_test = archive["images"], archive["labels"], archive["is_test"]
    samples: list[list[np.ndarray]] = [[] for _ in range(10)]
    rng = random.Random("bent")
    for image, label in zip(images[is_test == (split == "test")], labels[is_test == (split == "test")], strict=True):
        opacity = Image.fromarray(image.astype(np.float32) / 16).resize(DIGIT_PX[::-1], Image.Resampling.BILINEAR)
        bent = [_bend(opacity, rng) for _ in range(NUM_BENT)] if split == "train_bent" else []
        samples[label] += [np.repeat(np.asarray(shape)[..., None], 3, axis=2) for shape in (opacity, *bent)]
    return samples


def _bend(digit: Image.Image, rng: random.Random) -> Image.Image:
    """A random affine image of a digit about its centre."""
    xx, xy, yx, yy = (same + rng.uniform(-BEND, BEND) for same in (1, 0, 0, 1))
    x, y = (digit.width - 1) / 2, (digit.height - 1) / 2
    inverse = (xx, xy, x - xx * x - xy * y, yx, yy, y - yx * x - yy * y)
    return digit.transform(digit.size, Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR)
