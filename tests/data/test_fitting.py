"""Fitting gives the pixels of transformers' image processors, and never holds a long picture's whole square."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from megatron_sts.config.architecture import Processing, Resample
from megatron_sts.data.fitting import RESAMPLING, ROWS_AT_ONCE, Fitting

SIZE = 12
MEAN = [0.1, 0.5, 0.9]
SQUARES = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
PROCESSORS = {
    "pad": (LlavaImageProcessorPil, {"do_pad": True, **SQUARES}),
    "crop": (CLIPImageProcessorPil, SQUARES),
    "squash": (SiglipImageProcessorPil, {"size": {"height": SIZE, "width": SIZE}}),
}


def picture(width: int, height: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("processing", ["pad", "crop", "squash"])
@given(width=st.integers(1, 60), height=st.integers(1, 60), seed=st.integers(0, 2**32 - 1))
def test_pixels_are_those_of_transformers(processing: Processing, resample: Resample, width: int, height: int, seed: int) -> None:  # fmt: skip
    """Bit for bit: both resize with Pillow."""
    kind, options = PROCESSORS[processing]
    processor = kind(image_mean=MEAN, do_rescale=False, do_normalize=False, resample=RESAMPLING[resample], **options)
    image = picture(width, height, seed)
    expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    padding = (int(255 * 0.1), int(255 * 0.5), int(255 * 0.9))
    np.testing.assert_array_equal(Fitting(SIZE, processing, resample, padding).fit(image), expected)


@pytest.mark.parametrize("shape", [(3 * ROWS_AT_ONCE + 1, 300), (70, 2 * ROWS_AT_ONCE), (ROWS_AT_ONCE, 40)])
def test_padding_by_rows_is_padding(shape: tuple[int, int]) -> None:
    """LLaVA-1.5's ``expand2square`` (llava/mm_utils.py), then Pillow's resize of the whole square."""
    image, side = picture(*shape), max(shape)
    square = Image.new("RGB", (side, side), (1, 2, 3))
    square.paste(Image.fromarray(image), ((side - shape[0]) // 2, (side - shape[1]) // 2))
    expected = np.asarray(square.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(Fitting(SIZE, padding=(1, 2, 3)).fit(image), expected)


@pytest.mark.parametrize("processing", ["pad", "crop", "squash"])
def test_a_square_of_the_size_is_not_touched(processing: Processing) -> None:
    image = picture(SIZE, SIZE)
    assert Fitting(SIZE, processing).fit(image) is image
