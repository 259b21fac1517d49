"""Which visual tokens every sampler keeps of an image, as a model sees image and question. Must not know how it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.resolve import Resolved
from megatron_sts.config.schema import VtcConfig
from megatron_sts.config.tokens import kept_tokens
from megatron_sts.data.records import Record
from megatron_sts.evaluate.scenes import asking_stage, inference
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore.module import unwrap
from megatron_sts.model.compression import instructions
from megatron_sts.model.prepare import BatchPreparer
from megatron_sts.runtime.device import current_device
from megatron_sts.vtc.looking import make_looking_sampler
from megatron_sts.vtc.samplers import make_sampler
from megatron_sts.vtc.seen import SeenImages

SAMPLERS: tuple[VtcConfig, ...] = (
    VtcConfig(sampler="uniform"),
    VtcConfig(sampler="random"),
    VtcConfig(sampler="pooled"),
    VtcConfig(sampler="guided"),
    VtcConfig(sampler="anchored"),
)
"""All, at their defaults. Of ``pooled`` the centres of the areas are told that it averages."""


@dataclass(frozen=True)
class Kept:
    """Of one image."""

    pixels: torch.Tensor
    """As the tower sees it, uint8 [3, height, width]."""
    tokens: Mapping[str, Sequence[int]]
    """By sampler, ascending, row-major on the image's grid."""


@torch.no_grad()
def kept_of_images(
    resolved: Resolved, chunks: Sequence[torch.nn.Module], gate: SkipGate, records: Sequence[Record], keep_ratio: float
) -> list[Kept]:
    """Of records with one image each; the whole model on one rank.

    Raises:
        ConfigError: the model sees no images, or does not see them as a grid.
    """
    if (why := not_on_a_grid(resolved)) is not None:
        raise ConfigError(why)
    last = resolved.stages[-1]
    stage = asking_stage(resolved, last.uncompressed.sequence_length, len(records))
    preparer = BatchPreparer(resolved, stage, needs_pixels=True)
    samples = [[preparer.prepare(number, record, stage.uncompressed)] for number, record in enumerate(records)]
    batch = preparer.collate(samples, stage.uncompressed).to(current_device().torch_device)
    assert batch.pixels is not None
    model = unwrap(chunks[0])
    with inference(chunks, gate):
        words = model.language.embedding(input_ids=batch.tokens, position_ids=batch.position_ids)
        visual = model.project(model.features(batch.pixels).flatten(0, 1)).unflatten(0, (len(records), -1))
    rows, asked = instructions(batch)
    seen = SeenImages(visual, batch.pixels, words.transpose(0, 1)[rows], asked)
    counts = [kept_tokens(vtc, keep_ratio, last.visual_tokens_in, last.visual_multiple) for vtc in SAMPLERS]
    chosen = {
        vtc.sampler: _select(vtc, seen, count, resolved.config.seed)
        for vtc, count in zip(SAMPLERS, counts, strict=True)
    }
    return [
        Kept(batch.pixels[number].cpu(), {name: tokens[number].tolist() for name, tokens in chosen.items()})
        for number in range(len(records))
    ]


def not_on_a_grid(resolved: Resolved) -> str | None:
    """Why visual tokens cannot be drawn on the image."""
    model = resolved.config.model
    if model.vision is None:
        return "model.vision=null: there are no visual tokens to draw; give a run that sees images"
    if model.vision.tiles is not None:
        return "model.vision.tiles: an image's tokens are those of several squares; give a run without them"
    if model.qformer is not None:
        return "model.qformer: its tokens are no patches, which could be drawn; give a run without one"
    return None


def _select(vtc: VtcConfig, seen: SeenImages, num_kept: int, seed: int) -> torch.Tensor:
    looking = make_looking_sampler(vtc)
    if looking is not None:
        return looking.select(seen, num_kept)
    num_images, num_tokens_in, _ = seen.visual.shape
    return make_sampler(vtc, seed, 0).indices([(number, 0) for number in range(num_images)], num_tokens_in, num_kept)
