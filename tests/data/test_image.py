"""Pictures: every kind of file is decoded to known pixels or refused by name, and broken ones are bad samples."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin
from transformers.image_utils import load_image

from megatron_sts.data.colours import Change
from megatron_sts.data.image import decode_bytes, decode_image, decode_opened
from megatron_sts.data.records import BadSampleError, Reason
from tests.data.llava_files import picture
from tests.data.picture_files import chunk, png, saved, tiff

NOISE = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)


def row(encoded: bytes) -> list[list[int]]:
    """The first row's pixels."""
    found: list[list[int]] = decode_bytes(encoded, "picture").pixels[0].tolist()
    return found


@pytest.mark.parametrize(("kind", "said"), [("missing", "no such file"), ("folder", "directory"), ("text", "no picture"), ("half", "truncated")])  # fmt: skip
def test_bad_file_is_a_bad_sample(kind: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("no JPEG")
    elif kind == "half":
        path.write_bytes(picture(path, 1)[:900])
    with pytest.raises(BadSampleError, match=said) as refused:
        decode_image(path)
    assert refused.value.kind is None


DEEP = {
    "png": lambda grey: png(len(grey), 16, 0, [struct.pack(f">{len(grey)}H", *grey)]),
    "tiff, little-endian": lambda grey: tiff("<", 16, 1, 1, struct.pack(f"<{len(grey)}H", *grey), len(grey)),
    "tiff, big-endian": lambda grey: tiff(">", 16, 1, 1, struct.pack(f">{len(grey)}H", *grey), len(grey)),
    "pgm": lambda grey: b"P5 %d 1 65535\n" % len(grey) + struct.pack(f">{len(grey)}H", *grey),
    "jpeg 2000": lambda grey: saved(Image.fromarray(np.array([grey] * 8, np.uint16)), "JPEG2000", irreversible=False),
    "tiff, 32 bits": lambda grey: tiff("<", 32, 1, 1, struct.pack(f"<{len(grey)}I", *(65537 * value for value in grey)), len(grey)),
    "tiff, signed 32 bits": lambda grey: tiff(">", 32, 1, 2, struct.pack(f">{len(grey)}i", *(value << 15 for value in grey)), len(grey)),
    "tiff, signed 16 bits": lambda grey: tiff("<", 16, 1, 2, struct.pack(f"<{len(grey)}h", *(value // 2 for value in grey)), len(grey)),
    "tiff, white is zero": lambda grey: tiff("<", 16, 0, 1, struct.pack(f"<{len(grey)}H", *(65535 - value for value in grey)), len(grey)),
}  # fmt: skip


@pytest.mark.parametrize("kind", DEEP)
def test_deep_grey_is_scaled_by_its_range(kind: str) -> None:
    """A ramp from black to white; a byte twice is its value times 257, so that no level is rounded (signed ones: by one)."""
    levels = [*range(0, 248, 8), 255]
    decoded = decode_bytes(DEEP[kind]([257 * level for level in levels]), "ramp")
    assert decoded.changes == {Change.SCALED}
    difference = decoded.pixels[0].astype(int) - np.array(levels)[:, None]
    assert np.abs(difference).max() <= ("signed" in kind)


@pytest.mark.parametrize("dtype", [">u2", "<u2", np.int32])
def test_opened_deep_grey_is_scaled(dtype: str) -> None:
    top = np.iinfo(dtype).max
    opened = Image.fromarray(np.array([[0, top // 3, top]], dtype))
    assert decode_opened(opened, "opened")[0].tolist() == [[0] * 3, [85] * 3, [255] * 3]


def test_twelve_bits_have_a_range_of_their_own() -> None:
    assert row(tiff("<", 12, 1, 1, bytes([0xFF, 0xF8, 0x00]), 2)) == [[255] * 3, [128] * 3]  # 4095, 2048


REFUSED = {
    "floats": (saved(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "floating-point pixels (mode F)"),
    "negative grey": (tiff("<", 16, 1, 2, struct.pack("<2h", -5, 9), 2), "negative grey values"),
    "8 bits in 32": (tiff("<", 32, 1, 1, struct.pack("<2I", 0, 200), 2), "grey values up to 200 of 4294967295 (mode I) would all be black"),
    "strip": (saved(Image.new("RGB", (1, 33)), "PNG"), "1 x 33 pixels, longer than 32 times its width or height; cut it"),
    "199 megapixels": (png(19900, 1, 0, [b""] * 10000), "199,000,000 pixels, more than the 178,956,970 that are decoded; scale it down"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_meaning_is_refused_by_name(kind: str) -> None:
    encoded, said = REFUSED[kind]
    with pytest.raises(BadSampleError) as refused:
        decode_bytes(encoded, "a.png")
    assert str(refused.value).startswith(f"image a.png: {said}")
    assert refused.value.kind == Reason.UNFIT


RED_AND_CLEAR = np.array([[[255, 0, 0, 255], [0, 0, 0, 0], [0, 0, 0, 128]]], np.uint8)
ON_WHITE = [[255, 0, 0], [255, 255, 255], [127, 127, 127]]
TRANSPARENT = {
    "RGBA": (saved(Image.fromarray(RED_AND_CLEAR), "PNG"), ON_WHITE),
    "RGBA, webp": (saved(Image.fromarray(RED_AND_CLEAR), "WEBP", lossless=True), ON_WHITE),
    "RGBA, 16 bits": (png(1, 16, 6, [struct.pack(">4H", 0, 0, 0, 0x8000)]), [[127] * 3]),
    "LA": (saved(Image.fromarray(np.array([[[0, 255], [0, 0]]], np.uint8), "LA"), "PNG"), [[0] * 3, [255] * 3]),
    "PA": (saved(Image.fromarray(RED_AND_CLEAR).convert("PA"), "TIFF"), None),
    "palette": (png(2, 8, 3, [b"\0\1"], (b"PLTE", bytes([1, 2, 3, 4, 5, 6])), (b"tRNS", b"\0\xff")), [[255] * 3, [4, 5, 6]]),
    "palette, one clear": (png(2, 8, 3, [b"\0\1"], (b"PLTE", bytes([1, 2, 3, 4, 5, 6])), (b"tRNS", b"\xff\0")), [[1, 2, 3], [255] * 3]),
    "gif": (saved(Image.fromarray(np.array([[0, 1]], np.uint8), "P"), "GIF", transparency=1), None),
    "1 bit": (png(2, 1, 0, [b"\x40"], (b"tRNS", b"\0\0")), [[255] * 3, [255] * 3]),
    "2 bits": (png(4, 2, 0, [b"\x1b"], (b"tRNS", b"\0\1")), [[0] * 3, [255] * 3, [170] * 3, [255] * 3]),
    "4 bits": (png(2, 4, 0, [b"\x1e"], (b"tRNS", b"\0\1")), [[255] * 3, [238] * 3]),
    "8 bits": (png(2, 8, 0, [b"\5\x09"], (b"tRNS", b"\0\5")), [[255] * 3, [9] * 3]),
    "16 bits": (png(2, 16, 0, [struct.pack(">2H", 5, 9 * 257)], (b"tRNS", b"\0\5")), [[255] * 3, [9] * 3]),
    "RGB": (png(2, 8, 2, [bytes([1, 2, 3, 4, 5, 6])], (b"tRNS", bytes([0, 1, 0, 2, 0, 3]))), [[255] * 3, [4, 5, 6]]),
    "RGB, 16 bits": (png(2, 16, 2, [bytes([1, 9, 2, 9, 3, 9, 4, 0, 5, 0, 6, 0])], (b"tRNS", bytes([1, 9, 2, 9, 3, 9]))), [[255] * 3, [4, 5, 6]]),
}  # fmt: skip


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparency_is_laid_on_white(kind: str) -> None:
    """Wanted: by the PNG specification (tRNS is of the file's depth), c = alpha x colour + (1 - alpha) x 255."""
    encoded, wanted = TRANSPARENT[kind]
    decoded = decode_bytes(encoded, kind)
    assert Change.ON_WHITE in decoded.changes
    if wanted is not None:
        assert decoded.pixels[0].tolist() == wanted
    else:
        assert decoded.pixels[0, 1].tolist() == [255, 255, 255]


def test_black_text_on_a_transparent_ground_is_black_on_white() -> None:
    picture = np.zeros((20, 40, 4), np.uint8)
    picture[8:12, 5:35, 3] = 255
    found = decode_bytes(saved(Image.fromarray(picture), "PNG"), "text").pixels
    assert (found == np.where(picture[..., 3:] > 0, 0, 255)).all()


PLAIN = {
    "opaque RGBA": (saved(Image.fromarray(np.dstack([NOISE, np.full((30, 20), 255, np.uint8)])), "PNG"), NOISE),
    "grey": (saved(Image.fromarray(NOISE[..., 0]), "PNG"), np.repeat(NOISE[..., :1], 3, 2)),
    "one pixel": (saved(Image.new("RGB", (1, 1), (1, 2, 3)), "PNG"), np.array([[[1, 2, 3]]], np.uint8)),
    "1 x 32": (saved(Image.new("RGB", (1, 32), (1, 2, 3)), "PNG"), np.array([[[1, 2, 3]]] * 32, np.uint8)),
    **{kind: (saved(Image.fromarray(NOISE), kind), NOISE) for kind in ("PNG", "BMP", "TIFF", "PPM", "TGA", "SGI", "PCX")},
}  # fmt: skip


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_pictures_are_as_they_are(kind: str) -> None:
    decoded = decode_bytes(PLAIN[kind][0], kind)
    np.testing.assert_array_equal(decoded.pixels, PLAIN[kind][1])
    assert not decoded.changes


@pytest.mark.parametrize("kind", ["CMYK", "YCbCr", "P", "1", "LAB"])
def test_other_colours_are_as_in_transformers(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.tiff"
    path.write_bytes(
        saved(Image.fromarray(NOISE).convert(kind) if kind != "LAB" else Image.fromarray(NOISE, "LAB"), "TIFF")
    )
    np.testing.assert_array_equal(decode_image(path), np.asarray(load_image(str(path))))


def with_orientation(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif.tobytes()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_orientation_is_turned_upright_as_in_transformers(kind: str, orientation: int, tmp_path: Path) -> None:
    options = {"exif": with_orientation(orientation)} | ({"lossless": True} if kind == "WEBP" else {})
    path = tmp_path / "picture"
    path.write_bytes(saved(Image.fromarray(NOISE), kind, **options))
    decoded = decode_bytes(path.read_bytes(), "picture")
    np.testing.assert_array_equal(decoded.pixels, np.asarray(load_image(str(path))))
    assert decoded.pixels.shape == ((30, 20, 3) if orientation < 5 else (20, 30, 3))
    assert decoded.changes == (set() if orientation == 1 else {Change.TURNED})


@pytest.mark.parametrize("text", ["Raw profile type exif", "XML:com.adobe.xmp"])
def test_orientation_in_a_text_of_a_png(text: str, tmp_path: Path) -> None:
    """As ImageMagick and Adobe write it."""
    exif = with_orientation(6)
    said = {
        "Raw profile type exif": f"\nexif\n{len(exif):8}\n{exif.hex()}\n",
        "XML:com.adobe.xmp": '<x tiff:Orientation="6"/>',
    }[text]
    info = PngImagePlugin.PngInfo()
    info.add_itxt(text, said) if text.startswith("XML") else info.add_text(text, said, zip=True)
    path = tmp_path / "picture.png"
    path.write_bytes(saved(Image.fromarray(NOISE), "PNG", pnginfo=info))
    assert decode_image(path).shape == (20, 30, 3)
    np.testing.assert_array_equal(decode_image(path), np.asarray(load_image(str(path))))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_broken_exif_refuses_no_picture(kind: str) -> None:
    """Every picture with its EXIF cut or overwritten; transformers' loader raises on many."""
    drawn, exif = random.Random(0), with_orientation(6)
    for number in range(60):
        broken = bytearray(exif)
        for _ in range(1 + number % 5):
            broken[drawn.randrange(6, len(broken))] = drawn.randrange(256)
        encoded = saved(Image.fromarray(NOISE), kind, exif=bytes(broken[: drawn.randrange(7, len(broken) + 1)]))
        assert decode_bytes(encoded, "picture").pixels.shape in ((30, 20, 3), (20, 30, 3))


def test_broken_exif_of_a_tiff_refuses_no_picture() -> None:
    for pointer in (0, 9, 10**6):  # 34665: where its EXIF block lies
        assert row(tiff("<", 8, 1, 1, b"\1\2", 2, (34665, 4, pointer))) == [[1] * 3, [2] * 3]


def icc() -> bytes:
    return random.Random(0).randbytes(2_000_000)


LARGE = {
    "zTXt": (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(3_000_000))),
    "iTXt": (b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(3_000_000))),
    "iTXt, plain": (b"iTXt", b"Comment\0\0\0\0\0" + b"x" * 3_000_000),
    "tEXt": (b"tEXt", b"Comment\0" + b"x" * 3_000_000),
    "iCCP": (b"iCCP", b"profile\0\0" + zlib.compress(icc())),
    "XMP": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(3_000_000))),
    "EXIF as text": (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(3_000_000))),
    "not zlib": (b"zTXt", b"Raw profile type exif\0\0nothing"),
    "without a name": (b"iTXt", b""),
}


@pytest.mark.parametrize("kind", LARGE)
def test_png_with_large_metadata_is_decoded(kind: str) -> None:
    plain = saved(Image.fromarray(NOISE), "PNG")
    for place in (33, len(plain) - 12):  # behind the header, before the end
        encoded = plain[:place] + chunk(*LARGE[kind]) + plain[place:]
        np.testing.assert_array_equal(decode_bytes(encoded, "picture").pixels, NOISE)


def animation(kind: str, **options: object) -> bytes:
    frames = [Image.fromarray(np.full((4, 4, 3), level, np.uint8)) for level in (10, 200)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize(("kind", "options"), [("GIF", {}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("AVIF", {})])  # fmt: skip
def test_animations_and_pages_give_their_first(kind: str, options: dict[str, object]) -> None:
    decoded = decode_bytes(animation(kind, **options), "animation")
    assert np.abs(decoded.pixels.astype(int) - 10).max() <= 2  # AVIF is lossy
    assert decoded.changes == {Change.FIRST}


def test_a_photos_preview_is_no_second_picture() -> None:
    encoded = saved(Image.fromarray(NOISE), "MPO", save_all=True, append_images=[Image.new("RGB", (4, 4))], quality=100)
    assert Image.open(BytesIO(encoded)).format == "MPO"
    assert not decode_bytes(encoded, "photo").changes


def test_a_broken_second_picture_spoils_no_first() -> None:
    encoded = animation("GIF")
    for end in range(encoded.rindex(b"\x2c"), len(encoded)):
        np.testing.assert_array_equal(decode_bytes(encoded[:end], "gif").pixels, np.full((4, 4, 3), 10))


def test_files_that_pillow_runs_programs_for_are_no_pictures() -> None:
    encoded = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    assert Image.open(BytesIO(encoded)).format == "EPS"
    with pytest.raises(BadSampleError, match="no picture in a known format"):
        decode_bytes(encoded, "a.eps")


SAID = """
import sys
from megatron_sts.data.image import decode_bytes
print(decode_bytes(sys.stdin.buffer.read(), "large").pixels.shape)
"""


def test_nothing_but_our_words_is_printed() -> None:
    """95 megapixels with a broken announcement of an animation: Pillow warns of both."""
    large = png(9500, 1, 0, [bytes(1188)] * 10000, (b"acTL", b"\0" * 8))
    done = subprocess.run([sys.executable, "-c", SAID], input=large, capture_output=True, env=os.environ, timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == (b"(10000, 9500, 3)\n", b"", 0)
