"""Text density: what it answers to and what not, and the order in which patches are told apart."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from megatron_sts.vtc.text_density import STROKE_PX, _dilate, _erode, text_density

SIDE, PATCH = 8, 14


def density(image: np.ndarray) -> np.ndarray:
    """Of a grey image [h, w], as [SIDE, SIDE]."""
    pixels = torch.from_numpy(image.astype(np.uint8)).expand(1, 3, *image.shape)
    return text_density(pixels, SIDE).view(SIDE, SIDE).numpy()


def blank(shade: int = 128) -> np.ndarray:
    return np.full((SIDE * PATCH,) * 2, shade)


@pytest.mark.parametrize("ink", [0, 255])
def test_writing_is_found_dark_or_bright(ink: int) -> None:
    image = Image.fromarray(blank().astype(np.uint8))
    ImageDraw.Draw(image).text((PATCH, 3 * PATCH), "Hello", fill=ink, font=ImageFont.load_default(12))
    found = density(np.asarray(image))
    # Five letters of 12 px begin in column 1 and end before column 4; the line's neighbours get a share.
    best = np.argsort(found.ravel())[::-1][:2]
    assert set(best // SIDE) == {3} and set(best % SIDE) <= {1, 2, 3}
    assert (found[[0, 1, 5, 6, 7]] == 0).all() and (found[:, 6:] == 0).all()


def test_the_edge_of_a_large_area_is_no_text() -> None:
    image = blank(255)
    image[:, 3 * PATCH + 5 :] = 0
    # Opening and closing with a box leave a half-plane as it is.
    assert (density(image) == 0).all()


def test_a_stroke_counts_up_to_its_window() -> None:
    answers = []
    for width in (1, 3, 6, 7, 9):
        image = blank(255)
        image[:, 50 : 50 + width] = 0
        answers.append(density(image).sum())
    assert answers[0] < answers[1] < answers[2] and answers[3:] == [0, 0]


def test_contrast_counts_more_than_area() -> None:
    image = blank(200)
    image[:PATCH, :PATCH:6] = 150
    image[-PATCH:, -PATCH : -PATCH + 1] = 0
    found = density(image)
    assert found[0, 0] < found[-1, -1]


def test_brightness_as_a_whole_does_not_matter() -> None:
    generator = np.random.default_rng(0)
    image = generator.integers(0, 100, (SIDE * PATCH,) * 2)
    # Means of three equal uint8 values are exact, differences of such fp32 numbers are off by 1e-7 at most.
    np.testing.assert_allclose(density(image), density(image + 100), atol=1e-6)


def test_images_and_colours() -> None:
    pixels = torch.randint(0, 256, (3, 3, 56, 56), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = text_density(pixels, 4)
    assert batch.shape == (3, 16) and batch.dtype == torch.float32 and (batch > 0).all()
    assert torch.equal(batch, torch.cat([text_density(pixels[i : i + 1], 4) for i in range(3)]))


@pytest.mark.parametrize("size", [(64, 64), (7, 9), (1, 1)])
def test_windows_are_those_of_max_pool(size: tuple[int, int]) -> None:
    """torch's pooling says what the largest and the smallest value around each pixel are, to the last bit."""
    image = torch.rand(2, 1, *size, generator=torch.Generator().manual_seed(0))

    def pooled(values: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.pad(values, (STROKE_PX // 2,) * 4, mode="replicate"), STROKE_PX, stride=1)

    assert torch.equal(_dilate(image), pooled(image)) and torch.equal(_erode(image), -pooled(-image))
