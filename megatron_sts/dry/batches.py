"""The batches that a dry run trains on: full rows with as many images as the stage plans for, in a step's real shape."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from megatron_sts.config.checks import IMAGE_MODES
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.tokens import BEFORE_PROJECTOR, TokenCounts, round_up
from megatron_sts.data.batch import Batch
from megatron_sts.data.collate import PreparedSample, collate
from megatron_sts.data.records import Views
from megatron_sts.data.template import EncodedSample
from megatron_sts.mcore.groups import Place
from megatron_sts.model.images import SampleImages, Squares, Tiles
from megatron_sts.train.batches import StageBatches, share_pixels
from megatron_sts.vision.tower import fitting_of
from megatron_sts.vtc.positions import position_ids
from megatron_sts.vtc.samplers import UniformSampler, make_sampler
from megatron_sts.vtc.tiles import arrange


class PlannedBatches(StageBatches):
    """Stands for ``StageBatches``. Reads nothing: text is token 0, pictures are black."""

    def __init__(self, resolved: Resolved, stage: ResolvedStage, place: Place) -> None:
        self.wait_s, self.balanced = 0.0, None
        self._stage, self._place, self._vision = stage, place, resolved.config.model.vision
        self._first_stage_sees_pixels = resolved.first_stage_sees_pixels(stage)
        vtc = stage.config.vtc
        self._sampler = make_sampler(vtc, resolved.config.seed, stage.index) if vtc else UniformSampler()
        self._projects_all = vtc is not None and vtc.sampler not in BEFORE_PROJECTOR
        self._positions = vtc.positions if vtc else "original"

    def step(self, step: int) -> list[Batch]:
        """The step's micro-batches. Tensor- and context-parallel ranks get their pixels from the first of them, as in training."""
        batch = self._batch(self._stage.tokens(step))
        batches = [replace(batch, number=number) for number in range(self._stage.num_microbatches)]
        if not (self._place.is_first_stage and self._first_stage_sees_pixels):
            return batches if self._place.is_first_of_copy else [replace(one, pixels=None) for one in batches]
        if self._place.tp_size * self._place.cp_size == 1 or batch.pixels is None:
            return batches
        mine = [batch.pixels] * len(batches) if self._place.is_first_of_copy else []
        shape = tuple(batch.pixels.shape)
        return [replace(one, pixels=share_pixels(one.number, mine, shape)) for one in batches]

    @property
    def resident_bytes(self) -> int:
        """What each micro-batch holds on the device for the whole step: pixels that tensor- and context-parallel ranks share."""
        pixels = self._batch(self._stage.uncompressed).pixels
        is_shared = self._place.is_first_stage and self._place.tp_size * self._place.cp_size > 1
        is_shared &= self._first_stage_sees_pixels
        return pixels.nbytes if is_shared and pixels is not None else 0

    def close(self) -> None:
        """There is nothing to end."""

    def _batch(self, counts: TokenCounts) -> Batch:
        config = self._stage.config.batch
        sample = self._sample(counts)
        return collate(
            [[sample]] * config.micro_batch_size,
            sequence_length=round_up(sample.length, self._stage.token_multiple),
            dense_length=self._stage.uncompressed.sequence_length if config.packing == "pad" else None,
            pad_id=0,
            packed=config.packing == "pack",
            sample_multiple=self._stage.sample_multiple,
            num_context_ranks=self._place.cp_size,
            projects_all=self._projects_all,
        )

    def _sample(self, counts: TokenCounts) -> PreparedSample:
        """One that fills its row: its images, then words, the first half of them a user's."""
        images = self._images(counts)
        kept = images.kept
        num_visual = sum(map(len, kept))
        length = counts.sequence_length
        if self._stage.config.batch.packing == "none":  # rows are as long as their samples, which VTC makes shorter
            length -= sum(images.counts_in) - num_visual
        is_visual = [place < num_visual for place in range(length)]
        is_user = [num_visual <= place < (length + num_visual) // 2 for place in range(length)]
        is_target = [not (visual or user) for visual, user in zip(is_visual, is_user, strict=True)]
        encoded = EncodedSample([0] * length, is_target, is_visual, len(kept), is_user)
        places = position_ids(torch.tensor(is_visual), kept, images.counts_in, self._positions)
        pixels = None if self._vision is None else images.pixels()
        return PreparedSample(encoded, places, kept, self._stage.view_tokens, pixels, arrangements=images.arrangements)

    def _images(self, counts: TokenCounts) -> SampleImages:
        """Black ones."""
        has_images = self._vision is not None and (
            self._stage.data.source != "scenes" or self._stage.data.mode in IMAGE_MODES
        )
        if self._stage.pictures and self._vision is not None:
            black = np.zeros((self._vision.image_size, self._vision.image_size, 3), dtype=np.uint8)
            pictures = self._stage.pictures if has_images else ()
            arranged = tuple(
                arrange(one, self._stage.config.vtc, counts.keep_ratios, (0, 0, (0, number)))
                for number, one in enumerate(pictures)
            )
            views = [Views(np.stack([black] * one.num_views), "tiles", 0, 0) for one in pictures]
            return Tiles(views, arranged)
        side = 0 if self._vision is None else self._vision.image_size
        black = np.zeros((side, side, 3), dtype=np.uint8)
        num_images = self._stage.config.batch.max_images if has_images else 0
        fitting = None if self._vision is None else fitting_of(self._vision)
        sources = (lambda: black,) * num_images
        return Squares(0, sources, counts, self._stage.visual_tokens_in, self._sampler, fitting)
