"""An imported image processor is honoured or refused by name, and an exported one does what the run did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from megatron_sts.config.architecture import Processing, Resample, VisionConfig
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.weights_folder import check_same_model, read_sections
from megatron_sts.convert import hf_to_sts, verify
from megatron_sts.convert.image_processor import channels
from megatron_sts.convert.processing import image_processor, load_image_processor, with_processing
from megatron_sts.mcore import groups
from megatron_sts.runtime.dist import process_group
from megatron_sts.vision.tower import channel_statistics, fitting_of, normalise
from tests.convert import hf_models
from tests.convert.test_logits import RTOL

SIDE = 32
SHORTEST = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
VISION = VisionConfig(num_layers=1, hidden_size=4, num_attention_heads=1, image_size=SIDE, patch_size=8)
IMPORTED: dict[str, tuple[str, Any, Processing, Resample]] = {
    "clip": ("llava", CLIPImageProcessorPil(**SHORTEST), "crop", "bicubic"),
    "llava, padding": ("llava", LlavaImageProcessorPil(do_pad=True, **SHORTEST), "pad", "bicubic"),
    "llava": ("llava", LlavaImageProcessorPil(resample=Image.Resampling.BILINEAR, **SHORTEST), "crop", "bilinear"),
    "siglip": ("llava, siglip", SiglipImageProcessorPil(size={"height": 36, "width": 36}), "squash", "bicubic"),
    "blip": ("blip-2", BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=[0.1, 0.2, 0.3]), "squash", "bicubic"),
}  # fmt: skip


def difference(hf: Path, sts: Path) -> float:
    """As ``verify`` computes it, relative to the largest logit."""
    with process_group(60.0):
        expected, batch, resolved = verify.expect(hf, sts)
        groups.initialize(resolved.config.parallel, resolved.config.seed)
        found = verify.logits_of(resolved, batch)
        groups.destroy()
    assert found is not None
    return verify.largest_difference(found, expected, batch)


@pytest.mark.parametrize("kind", IMPORTED)
def test_imported_processor_is_honoured(kind: str, tmp_path: Path) -> None:
    """Pictures that are not square give transformers' logits; fitted in another way, they do not."""
    name, processor, processing, resample = IMPORTED[kind]
    hf, sts = hf_models.write(name, tmp_path / "hf"), tmp_path / "sts"
    processor.save_pretrained(hf)
    hf_to_sts.convert(hf_to_sts.whole(hf), sts)
    vision = read_sections(sts)["vision"]
    assert (vision.processing, vision.resample) == (processing, resample)
    assert difference(hf, sts) <= RTOL
    if kind not in ("clip", "siglip"):
        return
    other = "pad" if processing != "pad" else "crop"
    config = sts / "config.yaml"
    config.write_text(config.read_text().replace(f"processing: {processing}", f"processing: {other}"))
    assert difference(hf, sts) > 100 * RTOL


REFUSED = {
    "resample=lanczos: only bicubic and bilinear": CLIPImageProcessorPil(resample=Image.Resampling.LANCZOS, **SHORTEST),
    "size=.*48.*: the tower sees 32 x 32": CLIPImageProcessorPil(**SHORTEST | {"size": {"shortest_edge": 48}}),
    "crop_size=24 x 24: only 32 x 32": CLIPImageProcessorPil(**SHORTEST | {"crop_size": {"height": 24, "width": 24}}),
    "do_center_crop=False: pictures that are not square": CLIPImageProcessorPil(do_center_crop=False, **SHORTEST),
    "do_resize=False: ": CLIPImageProcessorPil(do_resize=False, **SHORTEST),
    "do_pad=True: ": CLIPImageProcessorPil(do_pad=True, **SHORTEST),
    "image_processor_type=LlavaNextImageProcessor: known are": LlavaNextImageProcessorPil(**SHORTEST),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_ours_does_not_do_is_refused(said: str, tmp_path: Path) -> None:
    REFUSED[said].save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=f"image processor with {said}"):
        with_processing(VISION, tmp_path, is_whole=True)


DAMAGED = {
    "transformers cannot read its image processor": {"image_processor_type": "OwlImageProcessor"},
    "size=None: ": SHORTEST | {"image_processor_type": "CLIPImageProcessor", "size": None},
    "crop_size=None: ": SHORTEST | {"image_processor_type": "CLIPImageProcessor", "crop_size": None},
    "rescale_factor=None: ": {"rescale_factor": None},
    r"image_mean=\['a', 0, 0\]: three numbers": {"image_mean": ["a", 0, 0]},
    r"damaged \(no image processor's settings\)": ["CLIPImageProcessor"],
    "no image processor's settings": {},
}


@pytest.mark.parametrize("said", DAMAGED)
def test_unknown_and_damaged_processors_are_one_line(said: str, tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(DAMAGED[said]))
    with pytest.raises(ConfigError, match=said) as refused:
        channels(tmp_path)
        with_processing(VISION, tmp_path, is_whole=True)
    assert "\n" not in str(refused.value)


def test_statistics_that_no_run_may_have_are_refused(tmp_path: Path) -> None:
    hf = hf_models.write("llava", tmp_path / "hf")
    (hf / "preprocessor_config.json").write_text('{"image_std": [0, 0, 0]}')
    with pytest.raises(ConfigError, match=r"^\S+: pixel_std.0=0.0: it should be greater"):
        hf_to_sts.whole(hf)


def test_statistics_that_a_file_leaves_out_are_its_kinds(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}'
    )
    assert channel_statistics(with_processing(VISION, tmp_path, is_whole=True)) == ((0.5,) * 3, (0.5,) * 3)


def test_a_tower_alone_leaves_the_way_to_a_square_to_the_run(tmp_path: Path) -> None:
    CLIPImageProcessorPil(resample=Image.Resampling.BILINEAR, **SHORTEST).save_pretrained(tmp_path)
    vision = with_processing(VISION, tmp_path, is_whole=False)
    assert (vision.processing, vision.resample) == (None, "bilinear")


@pytest.mark.parametrize("resample", ["bicubic", "bilinear"])
@pytest.mark.parametrize("processing", ["pad", "crop", "squash"])
def test_exported_processor_does_what_the_run_did(processing: Processing, resample: Resample, tmp_path: Path) -> None:
    vision = VISION.model_copy(update={"processing": processing, "resample": resample})
    image_processor(vision).save_pretrained(tmp_path)
    assert with_processing(VISION, tmp_path, is_whole=True) == vision
    for shape in ((40, 90), (70, 33), (SIDE, SIDE), (20, 10)):
        picture = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
        found = load_image_processor(tmp_path)(Image.fromarray(picture), return_tensors="pt").pixel_values
        fitted = torch.from_numpy(fitting_of(vision).fit(picture)).permute(2, 0, 1)[None]
        # A step of one of 255 would be 0.014; both normalise in fp32 or better.
        torch.testing.assert_close(found, normalise(fitted, *channel_statistics(vision)), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "made", "said"),
    [("processing", "crop", "crop"), ("resample", "bilinear", "bilinear"), ("pixel_mean", (0.1, 0.2, 0.3), r"\[0.1, 0.2, 0.3\]")],
)  # fmt: skip
def test_a_run_says_what_it_does_otherwise(name: str, made: Any, said: str, tmp_path: Path) -> None:
    """Its defaults are no choice: such a run would silently see other pictures than the weights were made with."""
    written = VISION.model_copy(update={name: made}).model_dump(mode="json", exclude_unset=True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model": {"vision": written}}))
    with pytest.raises(
        ConfigError, match=rf"^model.vision.{name}=null: the weights in .* were made with {said}; write"
    ):
        check_same_model("vision", VISION, tmp_path)
    other = {"processing": "pad", "resample": "bicubic", "pixel_mean": (0.0, 0.0, 0.0)}[name]
    check_same_model("vision", VISION.model_copy(update={name: other}), tmp_path)
