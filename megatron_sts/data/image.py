"""Decodes and resizes picture files."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from megatron_sts.data.records import BadSampleError


def decode_image(path: Path) -> np.ndarray:
    """A picture file as uint8 [height, width, 3], RGB.

    Raises:
        BadSampleError: the file is missing, truncated or no picture.
    """
    try:
        encoded = path.read_bytes()
    except FileNotFoundError as error:
        raise BadSampleError(f"image {path}: no such file") from error
    except OSError as error:
        raise BadSampleError(f"image {path}: {error.strerror}") from error
    return decode_bytes(encoded, path.name)


def decode_bytes(encoded: bytes, name: str) -> np.ndarray:
    """A picture file's bytes as uint8 [height, width, 3], RGB. ``name`` is for the message.

    Raises:
        BadSampleError: truncated or no picture.
    """
    try:
        with Image.open(BytesIO(encoded)) as image:
            return np.asarray(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise BadSampleError(
            f"image {name}: no picture in a known format; save it as JPEG or PNG"
        ) from error  # PIL names a memory address
    except Exception as error:  # decoders raise anything on corrupt bytes: SyntaxError, struct.error, IndexError ...
        raise BadSampleError(f"image {name}: {str(error) or type(error).__name__}") from error


LARGEST_ASPECT_RATIO = 32
"""At 336 pixels a picture's content is then 10 pixels high: less than a patch."""


Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""


def fit_square(image: np.ndarray, size: int, padding: Colour) -> np.ndarray:
    """Pads to a square with ``padding`` (LLaVA-1.5: the tower's mean) and resizes to uint8 [size, size, 3].

    Raises:
        BadSampleError: a strip, of which the square would be mostly padding, and maybe gigabytes.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    side = max(height, width)
    if side > LARGEST_ASPECT_RATIO * min(height, width):
        raise BadSampleError(
            f"image of {width} x {height}: longer than {LARGEST_ASPECT_RATIO} times its width or height"
        )
    picture = Image.fromarray(image)
    square = Image.new("RGB", (side, side), padding)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))
