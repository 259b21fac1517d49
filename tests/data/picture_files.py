"""Picture files byte by byte, of kinds that Pillow writes none of: every depth of PNG and TIFF, with chunks and tags as wanted."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO

from PIL import Image


def chunk(kind: bytes, content: bytes) -> bytes:
    """One PNG chunk."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, depth: int, colour: int, rows: list[bytes], *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG of these packed rows; ``extra`` chunks stand before the pixels. ``colour``: 0 grey, 2 RGB, 3 palette."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    chunks = [(b"IHDR", header), *extra, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def tiff(order: str, bits: int, photometric: int, sample_format: int, row: bytes, width: int, *tags: tuple[int, int, int]) -> bytes:  # fmt: skip
    """A TIFF of one row; ``order``: < or >. ``tags``: (number, type, value) of further ones, type 3 or 4."""
    written = [
        (256, 3, width),
        (257, 3, 1),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, -1),
        (277, 3, 1),
    ]
    written += [(278, 3, 1), (279, 4, len(row)), (339, 3, sample_format), *tags]
    start = 8 + 2 + 12 * len(written) + 4
    out = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}HIH", 42, 8, len(written))
    for number, kind, value in sorted(written):
        value = start if value == -1 else value
        out += struct.pack(f"{order}HHI", number, kind, 1) + struct.pack(f"{order}{'HH' if kind == 3 else 'I'}", *((value, 0) if kind == 3 else (value,)))  # fmt: skip
    return out + struct.pack(f"{order}I", 0) + row


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """A picture as Pillow writes it."""
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
