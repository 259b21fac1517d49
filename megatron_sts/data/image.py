"""Decodes pictures: the one way from a file, its bytes or an opened picture to upright RGB of 8 bits. Fits nothing.

Files of several pictures (animations, pages) give their first, as ``PIL.Image.open`` and so LLaVA and transformers do. CMYK, YCbCr,
LAB and palettes become RGB as Pillow converts them, without colour profiles.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from megatron_sts.config.siblings import named_alike
from megatron_sts.data.colours import Change, to_rgb, unfit
from megatron_sts.data.png import without_metadata
from megatron_sts.data.records import BadSampleError, Clip

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM", "TGA", "ICO", "PCX", "SGI")
"""Files that are read. Pillow knows more: EPS, for which it starts Ghostscript, and scientific ones whose values have no range."""
LARGEST_PIXELS = 2 * 89_478_485
"""What Pillow opens: half a gigabyte as RGB. It warns from half of that on."""
LARGEST_ASPECT_RATIO = 32
"""At 336 pixels a padded picture's content is then 10 pixels high: less than a patch."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns a picture of this EXIF orientation upright; of any other, nothing."""

# What Pillow finds odd about a file says nothing that training or a report needs, and comes again with each worker and epoch.
warnings.filterwarnings("ignore", module="PIL")
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Decoded:
    """A picture, and what was done to it beyond decoding."""

    pixels: np.ndarray
    """uint8 [height, width, 3], RGB."""
    changes: frozenset[Change]


def decode_image(path: Path) -> np.ndarray:
    """A picture file as uint8 [height, width, 3], RGB.

    Raises:
        BadSampleError: the file is missing, truncated, no picture, or one that is not used (``Reason.UNFIT``).
    """
    try:
        encoded = path.read_bytes()
    except FileNotFoundError as error:
        raise BadSampleError(f"image {path}: no such file{named_alike(path)}") from error
    except OSError as error:
        raise BadSampleError(f"image {path}: {error.strerror}") from error
    return decode_bytes(encoded, path.name).pixels


def decode_clip(paths: Sequence[Path]) -> Clip:
    """Frames of a video, from a file each.

    Raises:
        BadSampleError: see ``decode_image``.
    """
    return Clip(tuple(map(decode_image, paths)))


def decode_bytes(encoded: bytes, name: str) -> Decoded:
    """A picture file's bytes. ``name`` is for the message.

    Raises:
        BadSampleError: truncated, no picture, or one that is not used (``Reason.UNFIT``).
    """
    with _named(name), Image.open(BytesIO(without_metadata(encoded)), formats=FORMATS) as image:
        return _decoded(image)


def decode_opened(image: Image.Image, name: str) -> np.ndarray:
    """A picture that another library opened, as uint8 [height, width, 3], RGB.

    Raises:
        BadSampleError: see ``decode_bytes``.
    """
    with _named(name):
        return _decoded(image).pixels


def check_shape(width: int, height: int) -> None:
    """Raises BadSampleError for a strip, of which a square would show next to nothing."""
    if max(width, height) > LARGEST_ASPECT_RATIO * min(width, height):
        raise unfit(f"{width} x {height} pixels, longer than {LARGEST_ASPECT_RATIO} times its width or height; cut it")


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Whatever goes wrong within it is a bad sample, of this name."""
    try:
        yield
    except UnidentifiedImageError as error:
        reason = "no picture in a known format; save it as JPEG or PNG"  # Pillow names a memory address
        raise BadSampleError(f"image {name}: {reason}") from error
    except Image.DecompressionBombError as error:
        size = re.search(r"\d+", str(error))
        reason = f"{int(size[0]):,} pixels" if size else "too many pixels"
        reason = f"{reason}, more than the {LARGEST_PIXELS:,} that are decoded; scale it down"
        raise unfit(f"image {name}: {reason}") from error
    except BadSampleError as error:
        raise BadSampleError(f"image {name}: {error}", kind=error.kind) from error
    except Exception as error:  # decoders raise anything on corrupt bytes: SyntaxError, struct.error, IndexError ...
        raise BadSampleError(f"image {name}: {str(error) or type(error).__name__}") from error


def _decoded(image: Image.Image) -> Decoded:
    check_shape(*image.size)
    raw_mode, orientation = _raw_mode(image), _orientation(image)
    image.load()
    rgb, changes = to_rgb(image, raw_mode)
    if orientation in UPRIGHT:
        changes.add(Change.TURNED)
        if image.format != "TIFF":  # those Pillow turns when it loads them
            rgb = rgb.transpose(UPRIGHT[orientation])
    if _has_several(image):
        changes.add(Change.FIRST)
    return Decoded(np.asarray(rgb), frozenset(changes))


def _raw_mode(image: Image.Image) -> str:
    """How a file that is not loaded yet stores its pixels, else nothing."""
    tiles = getattr(image, "tile", [])
    arguments = (tiles[0].args if tiles else None) or ""
    return arguments if isinstance(arguments, str) else str(arguments[0])


def _has_several(image: Image.Image) -> bool:
    """Whether more pictures follow; a photo's preview (MPO) is none."""
    try:
        return bool(getattr(image, "is_animated", False)) and image.format != "MPO"
    except Exception:  # a GIF is read on for it: a broken second picture spoils no first
        return True


def _orientation(image: Image.Image) -> int:
    """1 (upright) if there is none that can be read: broken EXIF spoils no picture."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # Pillow's readers raise anything on corrupt bytes
        return 1
