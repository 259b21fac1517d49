"""Token counts of pictures in tiles are those of transformers' processors, and VTC's rules hold for every size."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaNextProcessor, LlavaOnevisionProcessor
from transformers.image_processing_utils import get_patch_output_size

from megatron_sts.config.architecture import VisionConfig
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.schema import VtcConfig
from megatron_sts.config.tiles import best_resolution, clip, kept_counts, largest, neighbours, scaled, square, tiled
from megatron_sts.vtc.tiles import arrange
from tests.dry.configs import MODEL, run_of

VIT = {"num_layers": 1, "hidden_size": 4, "num_attention_heads": 1}
NEXT = VisionConfig(
    **VIT, image_size=336, patch_size=14,
    tiles={"resolutions": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]},
)  # fmt: skip
ONE = VisionConfig(
    **VIT, tower="siglip", image_size=384, patch_size=14,
    tiles={
        "resolutions": [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)],
        "anyres_max": 9,
        "several": "squares",
    },
)  # fmt: skip
SIDES = st.integers(1, 4000)
SIZES = st.tuples(SIDES, SIDES).filter(lambda size: max(size) <= 32 * min(size))


def next_count(width: int, height: int) -> int:
    processor: Any = object.__new__(LlavaNextProcessor)
    processor.patch_size, processor.num_additional_image_tokens = 14, 1
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=[list(one) for one in NEXT.tiles.resolutions])
    return processor._get_number_of_features(height, width, 336, 336) - 1  # the class token


def one_count(width: int, height: int) -> int:
    processor: Any = object.__new__(LlavaOnevisionProcessor)
    processor.num_image_tokens, processor.vision_aspect_ratio = 729, "anyres_max_9"
    processor.image_processor = SimpleNamespace(image_grid_pinpoints=[list(one) for one in ONE.tiles.resolutions])
    return processor._get_number_of_features(height, width, 384, 384)


@pytest.mark.parametrize(("vision", "count"), [(NEXT, next_count), (ONE, one_count)], ids=["next", "onevision"])
def test_counts_are_transformers(vision: VisionConfig, count: Callable[[int, int], int]) -> None:
    @given(size=SIZES)
    def check(size: tuple[int, int]) -> None:
        assert tiled(*size, vision).num_tokens == count(*size)
        resolution = best_resolution(*size, vision.tiles.resolutions)
        image = np.empty((1, size[1], size[0]), dtype=np.bool_)
        assert scaled(*size, resolution)[::-1] == get_patch_output_size(image, resolution, "channels_first")

    check()


def test_published_counts() -> None:
    """LLaVA-NeXT's largest picture is 2 x 2 tiles; LLaVA-OneVision's has 9 tiles' tokens, another image 729, a frame 196."""
    assert [one.num_tokens for one in largest(NEXT, 2)] == [576 + 48 * 49] * 2
    assert [one.num_tokens for one in largest(ONE, 1)] == [729 + 135 * 55]
    assert tiled(2304, 2304, ONE).num_views == 37 and tiled(2304, 2304, ONE).num_tokens == 729 + 81 * 82
    assert square(1, ONE).num_tokens == 730 and clip(32, ONE).num_tokens == 32 * 196 + 1
    assert len(largest(ONE, 20)) == 20 and len(largest(ONE, 4)) == 1


VTCS = [
    VtcConfig(keep_ratio=0.25),
    VtcConfig(keep_ratio=0.6, sampler="random"),
    VtcConfig(keep_ratio_by_image=(1.0, 0.02)),
    VtcConfig(keep_ratio_by_image=(0.1, 0.3), sampler="random"),
    None,
]


@pytest.mark.parametrize("vtc", VTCS, ids=str)
@pytest.mark.parametrize("vision", [NEXT, ONE], ids=["next", "onevision"])
def test_a_newline_for_each_row_that_keeps_a_token(vision: VisionConfig, vtc: VtcConfig | None) -> None:
    """A count follows from the size alone, whatever random draws are; what is kept stands where it stood."""
    ratios = (1.0,) if vtc is None else vtc.keep_ratio_by_image or (vtc.keep_ratio,)

    @settings(max_examples=25, deadline=None)
    @given(size=SIZES, draw=st.integers(0, 10))
    def check(size: tuple[int, int], draw: int) -> None:
        picture = tiled(*size, vision)
        found = arrange(picture, vtc, ratios, (1, 2, (draw, 0)))
        num_kept, by_view = kept_counts(picture, vtc, ratios)
        assert num_kept == len(found.places)
        if vtc is None or vtc.sampler == "uniform":
            views = np.unique(found.sources) // overview_tokens(vision)
            assert by_view == tuple(np.bincount(views, minlength=picture.num_views))
        elif found.weights is None:
            assert sum(by_view) == found.num_projected
        assert (np.diff(found.places) > 0).all() and found.places[-1] < picture.num_tokens
        overview, mosaic = picture.blocks
        start, length = overview.rows_out * overview.columns_out, mosaic.columns_out + 1
        assert not found.is_newline[found.places < start].any()
        rows, columns = np.divmod(found.places[found.places >= start] - start, length)
        is_newline = found.is_newline[found.places >= start]
        assert (is_newline == (columns == length - 1)).all()
        assert sorted(rows[is_newline]) == sorted(set(rows[~is_newline]))  # one each, and none without a token
        for sources in found.sources:
            assert len(set(sources.tolist())) == len(sources)
        if vtc is not None and vtc.keep_ratio == 0.25:  # an even grid in each tile, also where padding cuts tiles
            share = (~is_newline).sum() / (mosaic.rows_out * mosaic.columns_out)
            assert min(mosaic.rows_out, mosaic.columns_out) < 16 or abs(share - 0.25) < 0.1

    check()


def test_blocks_draw_apart() -> None:
    """What a frame keeps at random says nothing about what the next one keeps, whatever the shift: half of their tokens agree."""
    num_frames = 16
    side = clip(1, ONE).blocks[0].rows_out
    found = arrange(clip(num_frames, ONE), VtcConfig(keep_ratio=0.5, sampler="random"), (0.5,), (1, 2, (3, 0)))
    kept = np.zeros(num_frames * side**2 + 1, dtype=np.bool_)
    kept[found.places] = True
    frames = kept[:-1].reshape(num_frames, -1)
    for shift in range(-8, 9):
        agreement = (np.roll(frames[:-1], -shift, axis=1) == frames[1:]).mean()
        assert abs(agreement - 0.5) < 6 * 0.5 / frames[1:].size ** 0.5, shift  # six standard deviations of fair coins


def overview_tokens(vision: VisionConfig) -> int:
    return (vision.image_size // vision.patch_size) ** 2


@pytest.mark.parametrize(("length", "num_out"), [(27, 14), (24, 12), (81, 70), (162, 81), (108, 98), (5, 5), (1, 1)])
def test_interpolation_is_torchs(length: int, num_out: int) -> None:
    import torch

    values = torch.randn(length)
    expected = torch.nn.functional.interpolate(values.view(1, 1, 1, -1), (1, num_out), mode="bilinear").flatten()
    first, second, weight = (torch.from_numpy(array) for array in neighbours(length, num_out))
    torch.testing.assert_close(values[first] * (1 - weight) + values[second] * weight, expected)


TILES = {"resolutions": [[32, 64], [64, 64]]}
REFUSED: dict[str, dict[str, Any]] = {
    r"model.vision.tiles.resolutions=\[32, 48\]: height and width must be multiples of image_size=32":
        {"model": {"vision": {**MODEL["vision"], "tiles": {"resolutions": [[32, 48]]}}}},
    "model.vision.processing=crop: tiles say how pictures are cut":
        {"model": {"vision": {**MODEL["vision"], "tiles": TILES, "processing": "crop"}}},
    "model.vision.tiles={...}: a Q-Former's tokens have no rows":
        {"model": {"vision": {**MODEL["vision"], "tiles": TILES}, "qformer": {"hidden_size": 24, "num_attention_heads": 4}}},
    "stages.only.vtc.sampler=guided: it knows one square grid":
        {"model": {"vision": {**MODEL["vision"], "tiles": TILES}}, "vtc": {"sampler": "guided"}},
    r"stages.only.optimizer.parts.vision=\{...\}: no vision learns here: frozen by stages.only.freeze; set it to null":
        {"optimizer": {"lr": 1e-3, "parts": {"vision": {"lr": 1e-4}}}},
    r"stages.only.optimizer.parts.qformer=\{...\}: no qformer learns here: the model has none; set it to null":
        {"optimizer": {"lr": 1e-3, "parts": {"qformer": {"weight_decay": 0.1}}}},
    r"stages.only.batch.sequence_length=64: 1 x 88 visual tokens \(the most tiles\) and 2 of text do not fit; use at least 90, or":
        {"model": {"vision": {**MODEL["vision"], "tiles": TILES}}},
}  # fmt: skip


@pytest.mark.parametrize("said", REFUSED)
def test_what_cannot_be_is_refused(said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}") as refused:
        run_of(**REFUSED[said])
    assert "\n" not in str(refused.value)


def test_rows_are_shorter_by_what_the_largest_picture_loses() -> None:
    model = {"vision": {**MODEL["vision"], "tiles": TILES}}
    [stage] = run_of(model=model, batch={"sequence_length": 160}, vtc={"keep_ratio_by_image": [1.0, 0.25]}).stages
    counts = stage.tokens(0)
    assert stage.visual_tokens_in == 16 + 8 * 9
    assert counts.visual_tokens_out == (16 + 16 + 8,) and sum(counts.projected_tokens) == 16 + 16
    assert counts.sequence_length == 160 - (88 - 40)
    assert (stage.num_images, stage.num_views) == (1, 5)
