"""The colours of opened pictures as RGB of 8 bits: deep grey is scaled, transparency is laid on white. Knows no files.

LLaVA's own ``convert("RGB")`` does neither: 16-bit grey comes out white, and a transparent ground in whatever colour hides
there, mostly black.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from PIL import Image

from megatron_sts.data.records import BadSampleError, Reason

WHITE = (255, 255, 255)
TIFF_BITS, TIFF_PHOTOMETRIC, TIFF_SAMPLE_FORMAT = 258, 262, 339
WHITE_IS_ZERO, SIGNED = 0, 2


class Change(StrEnum):
    """What was done to a picture beyond decoding it."""

    SCALED = "grey of more than 8 bits scaled to 8"
    ON_WHITE = "transparency laid on white"
    TURNED = "turned upright (EXIF orientation)"
    FIRST = "first picture of an animation or of several pages"


def unfit(reason: str) -> BadSampleError:
    """Of a whole picture that is not used: one without a clear meaning as 8-bit RGB, too large a one, or a strip."""
    return BadSampleError(reason, kind=Reason.UNFIT)


def to_rgb(image: Image.Image, raw_mode: str) -> tuple[Image.Image, set[Change]]:
    """A loaded picture in mode RGB, and what that took.

    Args:
        image: of any mode.
        raw_mode: how its file stores pixels, as Pillow calls it; empty: unknown.

    Raises:
        BadSampleError: its values have no known range.
    """
    if image.mode == "F":
        raise unfit("floating-point pixels (mode F), whose range is not known; save it with 8 bits")
    if image.mode.startswith("I"):
        return _deep_grey(image)
    if not image.has_transparency_data:
        return image.convert("RGB"), set()
    if "transparency" in image.info:
        image.info["transparency"] = _transparent_colour(image, raw_mode)
    rgba = image.convert("RGBA")
    return _on_white(rgba.convert("RGB"), rgba.getchannel("A"))


def _on_white(rgb: Image.Image, opacity: Image.Image) -> tuple[Image.Image, set[Change]]:
    if opacity.getextrema()[0] == 255:
        return rgb, set()
    return Image.composite(rgb, Image.new("RGB", rgb.size, WHITE), opacity), {Change.ON_WHITE}


def _transparent_colour(image: Image.Image, raw_mode: str) -> object:
    """A PNG's transparent colour (tRNS) is of its file's depth; Pillow compares it with the 8-bit pixels as it is."""
    colour = image.info["transparency"]
    if raw_mode in ("L;2", "L;4"):
        return colour * {"L;2": 85, "L;4": 17}[raw_mode]
    if raw_mode == "RGB;16B":
        return tuple(part >> 8 for part in colour)
    return colour


def _deep_grey(image: Image.Image) -> tuple[Image.Image, set[Change]]:
    """0 is black, the largest value that the file's numbers can have is white."""
    values, largest = np.asarray(image), _largest(image)
    if largest == 2**32 - 1:
        values = values.view(np.uint32)  # Pillow keeps them in signed numbers
    if values.min() < 0:
        raise unfit(f"negative grey values (mode {image.mode}), for which there is no black; save it with 8 bits")
    levels = np.rint(values.astype(np.float32) * np.float32(255 / largest)).astype(np.uint8)
    if values.any() and not levels.any():
        raise unfit(
            f"grey values up to {values.max()} of {largest} (mode {image.mode}) would all be black; save it with 8 bits"
        )
    if image.format == "TIFF" and image.tag_v2.get(TIFF_PHOTOMETRIC) == WHITE_IS_ZERO:  # type: ignore[attr-defined]
        levels = 255 - levels  # Pillow does so with 8 bits only
    rgb, changes = Image.fromarray(levels).convert("RGB"), {Change.SCALED}
    if "transparency" in image.info:
        opacity = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
        rgb, further = _on_white(rgb, Image.fromarray(opacity))
        changes |= further
    return rgb, changes


def _largest(image: Image.Image) -> int:
    """White: a TIFF says its bits; other files have 16, also where Pillow opens them in mode I, of 32 signed bits."""
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        is_signed = tags.get(TIFF_SAMPLE_FORMAT, (1,))[0] == SIGNED
        return 2 ** (tags[TIFF_BITS][0] - is_signed) - 1
    return 2**31 - 1 if image.mode == "I" and image.format is None else 65535
