"""How a Hugging Face folder's image processor makes squares of pictures, in words of our config and back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

from megatron_sts.config.architecture import Processing, Resample, TilesConfig, VisionConfig
from megatron_sts.config.errors import ConfigError
from megatron_sts.convert.architectures import import_transformers
from megatron_sts.convert.image_processor import read_image_processor
from megatron_sts.data.fitting import RESAMPLING
from megatron_sts.vision.tower import channel_statistics

KNOWN = ("CLIPImageProcessor", "LlavaImageProcessor", "SiglipImageProcessor", "BlipImageProcessor", "ViTImageProcessor")
"""Kinds that resize, crop and normalise, and nothing else (Llava's may pad first)."""


def load_image_processor(folder: Path) -> Any:
    """The folder's image processor, which resizes with Pillow as we do; None if there is none.

    Raises:
        ConfigError: transformers does not know it.
    """
    if not read_image_processor(folder):
        return None
    try:
        return import_transformers().AutoImageProcessor.from_pretrained(folder, backend="pil", trust_remote_code=False)
    except (ValueError, OSError, TypeError, KeyError, AttributeError) as error:
        reason = " ".join(str(error).split()).split(". ")[0]
        raise ConfigError(f"{folder}: transformers cannot read its image processor ({reason}); correct it") from None


def with_processing(vision: VisionConfig, folder: Path, *, is_whole: bool) -> VisionConfig:
    """The same tower with the folder's interpolation and, of a whole model, its way to a square and its statistics.

    A tower alone is joined with a text model by training, for which the run chooses the way.

    Raises:
        ConfigError: its processor computes something that ours does not.
    """
    written = read_image_processor(folder)
    if not is_whole:
        said = written.get("resample")
        return vision if said is None else vision.model_copy(update={"resample": _resample(said, folder)})
    processor = load_image_processor(folder)
    if processor is None:
        return vision
    found: dict[str, Any] = {"resample": _resample(processor.resample, folder)}
    if vision.tiles is None:
        found["processing"] = _processing(processor, vision.image_size, folder)
    else:
        _check_tiles(processor, vision, vision.tiles, folder)
    statistics = tuple(processor.image_mean), tuple(processor.image_std)  # its kind's own where the file says nothing
    if processor.do_normalize and statistics != channel_statistics(vision):
        found |= dict(zip(("pixel_mean", "pixel_std"), statistics, strict=True))
    return vision.model_copy(update=found)


def image_processor(vision: VisionConfig) -> Any:
    """One of transformers that does to pictures what a run with this tower did."""
    mean, std = channel_statistics(vision)
    square = {"height": vision.image_size, "width": vision.image_size}
    if vision.tiles is not None:
        kind = getattr(import_transformers(), _kind_of(vision.tiles))
        return kind(
            size=square if vision.tiles.several == "squares" else {"shortest_edge": vision.image_size},
            crop_size=square,
            image_grid_pinpoints=[list(resolution) for resolution in vision.tiles.resolutions],
            resample=RESAMPLING[vision.resample or "bicubic"],
            image_mean=list(mean),
            image_std=list(std),
        )
    processing = vision.processing or "pad"
    return import_transformers().LlavaImageProcessor(
        do_pad=processing == "pad",
        size=square if processing == "squash" else {"shortest_edge": vision.image_size},
        do_center_crop=processing != "squash",
        crop_size=square,
        resample=RESAMPLING[vision.resample or "bicubic"],
        image_mean=list(mean),
        image_std=list(std),
    )


def video_settings(pictures: Any) -> dict[str, Any]:
    """Of a LLaVA-OneVision's video processor that does to frames what the image processor ``pictures`` does to overviews."""
    said = pictures.to_dict()
    names = ("size", "resample", "image_mean", "image_std", "rescale_factor")
    steps = dict.fromkeys(("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"), True)
    return {"video_processor_type": "LlavaOnevisionVideoProcessor", **steps, **{name: said[name] for name in names}}


def _resample(number: int, folder: Path) -> Resample:
    names: Mapping[int, Resample] = {number: name for name, number in RESAMPLING.items()}
    if number not in names:
        known = {one.value: one.name.lower() for one in Image.Resampling}
        _refuse(folder, "resample", known.get(number, number), f"only {' and '.join(names.values())} can be computed")
    return names[number]


def _processing(processor: Any, image_size: int, folder: Path) -> Processing:
    kind = type(processor).__name__.removesuffix("Pil")
    if kind not in KNOWN:
        _refuse(folder, "image_processor_type", kind, f"known are {', '.join(KNOWN)}")
    if not processor.do_resize:
        _refuse(folder, "do_resize", False, "the model would see pictures of any size")
    pads, crops = bool(processor.do_pad), bool(processor.do_center_crop)
    size, crop = processor.size, processor.crop_size
    if pads and kind != "LlavaImageProcessor":
        _refuse(folder, "do_pad", True, "it fills up the pictures of a batch behind their ends")
    if size is None:
        _refuse(folder, "size", None, f"the tower sees {image_size} x {image_size} pixels")
    resized = (size.height, size.width) if size.height else (size.shortest_edge,) * 2
    if resized != (image_size,) * 2 or size.longest_edge:
        _refuse(folder, "size", {name: value for name, value in vars(size).items() if value}, f"the tower sees {image_size} x {image_size} pixels")  # fmt: skip
    if crops and (crop is None or (crop.height, crop.width) != resized):
        said = crop and f"{crop.height} x {crop.width}"
        _refuse(folder, "crop_size", said, f"only {image_size} x {image_size} can be computed")
    if pads or size.height:
        return "pad" if pads else "squash"
    if not crops:
        _refuse(folder, "do_center_crop", False, "pictures that are not square would stay so")
    return "crop"


def _kind_of(tiles: TilesConfig) -> str:
    return "LlavaOnevisionImageProcessor" if tiles.several == "squares" else "LlavaNextImageProcessor"


def _check_tiles(processor: Any, vision: VisionConfig, tiles: TilesConfig, folder: Path) -> None:
    """It cuts pictures as the model's config says, and tiles stay as they are cut."""
    kind, side = type(processor).__name__.removesuffix("Pil"), vision.image_size
    if kind != _kind_of(tiles):
        _refuse(folder, "image_processor_type", kind, f"the model's pictures are cut by a {_kind_of(tiles)}")
    pinpoints = tuple(tuple(resolution) for resolution in processor.image_grid_pinpoints)
    if pinpoints != tiles.resolutions:
        _refuse(folder, "image_grid_pinpoints", f"<{len(pinpoints)} entries>", "config.json has others")
    for name, size in (("size", processor.size), ("crop_size", processor.crop_size)):
        if name == "crop_size" and size is None and not processor.do_center_crop:
            continue
        lengths = {} if size is None else {key: value for key, value in vars(size).items() if value}
        if not lengths or set(lengths.values()) != {side} or "longest_edge" in lengths:
            _refuse(folder, name, lengths or None, f"the tower sees {side} x {side} pixels")
    if not processor.do_resize:
        _refuse(folder, "do_resize", False, "the overview would be no square")


def _refuse(folder: Path, key: str, value: object, why: str) -> NoReturn:
    raise ConfigError(f"{folder}: image processor with {key}={value}: {why}; such a model cannot be converted")
