"""What a model sees of a picture is what its config says: decoded, made a square, nothing else."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_sts.data.fitting import Fitting
from megatron_sts.data.image import decode_image
from megatron_sts.data.records import Record, Turn
from megatron_sts.model.prepare import BatchPreparer
from megatron_sts.vision.tower import padding_colour
from tests.dist.ladder import resolved_run, write_samples, written_run


@pytest.mark.parametrize("processing", [None, "pad", "crop", "squash"])
def test_processing_and_interpolation_are_the_configs(processing: str | None, tmp_path: Path) -> None:
    write_samples(tmp_path, num_samples=1)
    drawn = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(drawn).save(tmp_path / "wide.png")
    written = written_run(tmp_path)
    written["model"]["vision"] |= {"processing": processing, "resample": "bilinear"}
    run = resolved_run(written)
    preparer = BatchPreparer(run, run.stages[0], needs_pixels=True)
    turns = (Turn("user", "<image>what?"), Turn("assistant", "colours"))
    record = Record("wide", turns, (partial(decode_image, tmp_path / "wide.png"),))
    [pixels] = preparer.prepare(0, record, run.stages[0].tokens(0)).pixels or ()
    vision = run.config.model.vision
    assert vision is not None
    expected = Fitting(32, processing or "pad", "bilinear", padding_colour(vision)).fit(drawn)  # type: ignore[arg-type]
    np.testing.assert_array_equal(pixels, expected)


def test_a_model_without_eyes_is_asked_in_words(tmp_path: Path) -> None:
    """Evaluation asks the first stage's ranks for pixels, whatever the model."""
    written = written_run(tmp_path, {"name": "words", "steps": 1})
    written["model"]["vision"] = None
    written["data"] = {"source": "scenes", "mode": "words"}
    run = resolved_run(written)
    preparer = BatchPreparer(run, run.stages[0], needs_pixels=True)
    record = Record("words", (Turn("user", "is there a cat ?"), Turn("assistant", "no")), ())
    assert not preparer.prepare(0, record, run.stages[0].tokens(0)).pixels
