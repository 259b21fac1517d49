"""What a PNG says beside its pixels, left out before Pillow reads it: Pillow refuses pictures whose metadata is large."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import chain

SIGNATURE = b"\x89PNG\r\n\x1a\n"
METADATA = (b"iCCP", b"iTXt", b"tEXt", b"zTXt")
"""Chunks of a colour profile and of texts."""
ORIENTATION_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0", b"exif\0")
"""Texts in which Pillow looks for the EXIF orientation, if there is no eXIf chunk."""
LARGEST_TEXT_BYTES = 1_000_000
"""Pillow's own limit is 1 MiB."""


def without_metadata(encoded: bytes) -> bytes:
    """The same picture without its colour profile and texts, which nobody reads here; texts of up to a megabyte that may hold
    its orientation stay. What is no PNG, and the rest of a broken one, comes back as it is."""
    if not encoded.startswith(SIGNATURE):
        return encoded
    return b"".join(chain([SIGNATURE], (chunk for chunk in _chunks(encoded) if not _is_left_out(chunk))))


def _chunks(encoded: bytes) -> Iterator[bytes]:
    """The chunks with length and checksum. A last one may be cut short, or go on to the end of the file."""
    start = len(SIGNATURE)
    while start < len(encoded):
        end = start + 12 + int.from_bytes(encoded[start : start + 4])
        yield encoded[start:end]
        start = end


def _is_left_out(chunk: bytes) -> bool:
    kind, content = chunk[4:8], chunk[8:-4]
    if kind not in METADATA:
        return False
    return not content.startswith(ORIENTATION_TEXTS) or _text_bytes(kind, content) > LARGEST_TEXT_BYTES


def _text_bytes(kind: bytes, content: bytes) -> int:
    """Length of a text, counted up to just above ``LARGEST_TEXT_BYTES`` where it is compressed."""
    _, _, rest = content.partition(b"\0")  # behind its name
    packed = rest[1:] if kind == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    try:
        return max(len(content), len(zlib.decompressobj().decompress(packed, LARGEST_TEXT_BYTES + 1)))
    except zlib.error:  # not compressed
        return len(content)
