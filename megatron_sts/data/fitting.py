"""Fits decoded pictures to the tower's square, or cuts them into several. Knows no files and no tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from megatron_sts.config.architecture import Processing, Resample, TilesConfig
from megatron_sts.config.tiles import best_resolution, scaled
from megatron_sts.data.records import BadSampleError, Clip, Views

Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""
RESAMPLING: dict[Resample, Image.Resampling] = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}
ROWS_AT_ONCE = 256
"""Rows that are padded together, so that the square of a long picture (gigabytes) never exists."""


@dataclass(frozen=True)
class Fitting:
    """How a picture becomes a square. Each ``processing`` gives the pixels of transformers' image processors (backend pil):

    pad: a ``LlavaImageProcessor`` with ``do_pad``, and LLaVA-1.5's own ``expand2square``; crop: a ``CLIPImageProcessor``;
    squash: a ``SiglipImageProcessor`` or ``BlipImageProcessor``.
    """

    size: int
    """Pixels of the square's side."""
    processing: Processing = "pad"
    resample: Resample = "bicubic"
    padding: Colour = (0, 0, 0)
    tiles: TilesConfig | None = None
    """How pictures are cut by ``views``; then ``processing`` is that of pictures that are not."""

    def fit(self, image: np.ndarray) -> np.ndarray:
        """uint8 [height, width, 3], no strip (``data.image.check_shape``) -> uint8 [size, size, 3]."""
        if image.shape[:2] == (self.size, self.size):
            return image
        return np.asarray(_SQUARES[self.processing](Image.fromarray(image), self))

    def views(self, image: np.ndarray | Clip | Views, *, is_alone: bool) -> Views:
        """A picture as its overview, not padded but distorted, and tiles; as the image processors of LLaVA-NeXT and LLaVA-OneVision in
        transformers (backend pil) give it. One of several may be a padded square (``TilesConfig.several``); frames are distorted squares.

        Args:
            image: uint8 [height, width, 3], a clip, or what this has returned.
            is_alone: the sample has no other.

        Raises:
            BadSampleError: it was cut already, into other squares than the tower's.
        """
        assert self.tiles is not None
        if isinstance(image, Views):
            if (found := image.pixels.shape[1:3]) != (self.size, self.size):
                sides = f"model.vision.image_size={self.size}"
                raise BadSampleError(f"cut into squares of {found[1]} x {found[0]} pixels, not {sides}; cut it anew")
            return image
        if isinstance(image, Clip):
            frames = [np.asarray(_squashed(Image.fromarray(frame), self)) for frame in image.frames]
            return Views(np.stack(frames), "clip", image.frames[0].shape[1], image.frames[0].shape[0])
        height, width, _ = image.shape
        if not is_alone and self.tiles.several == "squares":
            return Views(self.fit(image)[None], "square", width, height)
        picture = Image.fromarray(image)
        squares = [np.asarray(_squashed(picture, self)), *_cut(picture, self.tiles, self)]
        return Views(np.stack(squares), "tiles", width, height)


def _padded(picture: Image.Image, fitting: Fitting) -> Image.Image:
    """Padded to a square and resized, by rows: Pillow, too, resizes in x first, row by row, then in y."""
    (width, height), size, resampling = picture.size, fitting.size, RESAMPLING[fitting.resample]
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    narrow = Image.new("RGB", (size, side), fitting.padding)
    for first in range(0, height, ROWS_AT_ONCE):
        end = min(first + ROWS_AT_ONCE, height)
        rows = Image.new("RGB", (side, end - first), fitting.padding)
        rows.paste(picture.crop((0, first, width, end)), (left, 0))
        narrow.paste(rows.resize((size, end - first), resampling), (0, top + first))
    return narrow.resize((size, size), resampling)


def _cropped(picture: Image.Image, fitting: Fitting) -> Image.Image:
    """The shorter side resized, the middle of the longer one kept."""
    (width, height), size = picture.size, fitting.size
    longer = int(size * max(width, height) / min(width, height))
    resized = picture.resize((size, longer) if width <= height else (longer, size), RESAMPLING[fitting.resample])
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    return resized.crop((left, top, left + size, top + size))


def _squashed(picture: Image.Image, fitting: Fitting) -> Image.Image:
    return picture.resize((fitting.size, fitting.size), RESAMPLING[fitting.resample])


def _cut(picture: Image.Image, tiles: TilesConfig, fitting: Fitting) -> Iterator[np.ndarray]:
    """Scaled to fill its resolution in one direction, padded with black in the other, and cut, row by row."""
    high, wide = best_resolution(*picture.size, tiles.resolutions)
    resized = picture.resize(scaled(*picture.size, (high, wide)), RESAMPLING[fitting.resample])
    canvas = Image.new("RGB", (wide, high))
    canvas.paste(resized, ((wide - resized.width) // 2, (high - resized.height) // 2))
    pixels, side = np.asarray(canvas), fitting.size
    for top in range(0, high, side):
        for left in range(0, wide, side):
            yield pixels[top : top + side, left : left + side]


_SQUARES: dict[Processing, Callable[[Image.Image, Fitting], Image.Image]] = {
    "pad": _padded,
    "crop": _cropped,
    "squash": _squashed,
}
