"""Pictures: every kind of bad file is a bad sample, and fitting pads with the given colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sts.data.image import decode_image, fit_square
from megatron_sts.data.records import BadSampleError
from tests.data.llava_files import picture


@given(st.integers(2, 60), st.integers(2, 60), st.integers(0, 2**32 - 1))
def test_padding_has_the_given_colour(height: int, width: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    side = max(height, width)
    fitted = fit_square(image, side, (1, 20, 255))
    top, left = (side - height) // 2, (side - width) // 2
    wanted = np.empty((side, side, 3), np.uint8)
    wanted[:] = (1, 20, 255)
    wanted[top : top + height, left : left + width] = image
    np.testing.assert_array_equal(fitted, wanted)  # nothing is scaled, so nothing is rounded


@pytest.mark.parametrize(("kind", "said"), [("missing", "no such file"), ("folder", "directory"), ("text", "no picture"), ("half", "truncated")])  # fmt: skip
def test_bad_file_is_a_bad_sample(kind: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("no JPEG")
    elif kind == "half":
        path.write_bytes(picture(path, 1)[:900])
    with pytest.raises(BadSampleError, match=said):
        decode_image(path)
