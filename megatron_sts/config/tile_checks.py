"""Refusals around pictures in tiles, and of shares that images have of their own. Torch-free."""

from __future__ import annotations

from megatron_sts.config.architecture import ModelConfig, VisionConfig
from megatron_sts.config.errors import refuse
from megatron_sts.config.schema import StageConfig
from megatron_sts.config.tokens import BEFORE_PROJECTOR


def check_tiles(vision: VisionConfig, *, has_qformer: bool) -> None:
    """Tiles fill the resolutions, their tokens form rows, and nothing says otherwise how pictures are cut."""
    if vision.tiles is None:
        return
    for resolution in vision.tiles.resolutions:
        if any(length % vision.image_size for length in resolution):
            refuse("model.vision.tiles.resolutions", list(resolution),
                   f"height and width must be multiples of image_size={vision.image_size}, a tile's side", "use multiples")  # fmt: skip
    if vision.processing not in (None, "pad"):
        refuse("model.vision.processing", vision.processing, "tiles say how pictures are cut, and one of several is padded",
               "leave it out, or set model.vision.tiles=null")  # fmt: skip
    if has_qformer:
        refuse("model.vision.tiles", "{...}", "a Q-Former's tokens have no rows by which tiles could be joined",
               "set model.qformer or model.vision.tiles to null")  # fmt: skip


def check_kept_tiles(stage: StageConfig, model: ModelConfig) -> None:
    """A sampler of tiles knows their grids; without tiles, no image that has a share of its own is one too many."""
    if (vtc := stage.vtc) is None:
        return
    if model.vision is not None and model.vision.tiles is not None:
        if vtc.sampler not in BEFORE_PROJECTOR:
            refuse(f"stages.{stage.name}.vtc.sampler", vtc.sampler, "it knows one square grid, and tiles are parts of another",
                   f"use {' or '.join(BEFORE_PROJECTOR)}, or set model.vision.tiles=null")  # fmt: skip
    elif (count := len(vtc.keep_ratio_by_image)) > stage.batch.max_images:
        refuse(f"stages.{stage.name}.vtc.keep_ratio_by_image", list(vtc.keep_ratio_by_image),
               f"{count} ratios, but a sample has at most batch.max_images={stage.batch.max_images} images",
               "remove some, or raise batch.max_images")  # fmt: skip
