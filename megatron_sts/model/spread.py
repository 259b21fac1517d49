"""A frozen tower on all ranks of a model copy: a step's images are encoded before its first pass, an equal share on each rank.

The first stage then has the features of all its micro-batches at once, without a backward pass through what made them. After
VTC that chooses without looking they are those of the kept tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.tower import IMAGES_AT_ONCE
from megatron_sts.data.batch import Batch
from megatron_sts.launch import trail
from megatron_sts.mcore.exchange import CopyExchange
from megatron_sts.mcore.groups import place
from megatron_sts.mcore.module import unwrap
from megatron_sts.model.compression import Compression
from megatron_sts.model.mllm import MultimodalModel
from megatron_sts.runtime.clock import Kind, StepClock
from megatron_sts.runtime.device import current_device
from megatron_sts.vtc.compressor import compress


class SpreadTower:
    """Encodes the images of one stage's steps; on every rank."""

    def __init__(
        self, tower: torch.nn.Module, image_size: int, num_tokens_in: int, clock: StepClock, *,
        keeps_some: bool, keeps_pixels: bool,
    ) -> None:  # fmt: skip
        """``keeps_some``: nothing that follows sees the tokens that VTC leaves out. ``keeps_pixels``: something looks at them in a pass."""
        self._tower, self._num_tokens_in, self._clock = tower, num_tokens_in, clock
        self._keeps_some, self._keeps_pixels = keeps_some, keeps_pixels
        self._exchange = CopyExchange()
        self._waiting: Kind = "pipeline_wait" if place().pp_size > 1 else "communication"
        self._device = current_device().torch_device
        self._image_shape = (3, image_size, image_size)
        blank = torch.zeros(1, *self._image_shape, dtype=torch.uint8, device=self._device)
        self._of_image = self._encode_some(blank)[0]
        """What it gives of one image, [t, d]: ranks that encode none must know the shape."""

    def encode(self, batches: Sequence[Batch]) -> list[Batch]:
        """The micro-batches with the features of their images on the first stage, and without their pixels if nothing looks at them
        again; a collective of the model copy. ``pixels`` of all are on its first rank."""
        trail.enter("vision")
        kept = [tokens for batch in batches for tokens in kept_tokens(batch, self._num_tokens_in)]
        if kept:
            with self._clock.running(self._waiting):
                pixels = self._dealt(batches, len(kept))
            starts = list(accumulate(map(len, kept) if self._keeps_some else [1] * len(kept), initial=0))
            batches = list(_given(batches, self._features(pixels, kept, starts), starts))
        return [batch if self._keeps_pixels else replace(batch, pixels=None) for batch in batches]

    def _features(
        self, pixels: torch.Tensor, kept: Sequence[torch.Tensor], starts: Sequence[int]
    ) -> torch.Tensor | None:
        """Of all the step's images on the first stage, else None; ``starts``: where each image's rows begin, [images + 1]."""
        exchange, of_row = self._exchange, self._of_image.shape[1:] if self._keeps_some else self._of_image.shape
        shares = [exchange.share(len(kept), rank) for rank in range(exchange.num_ranks)]
        mine = shares[exchange.rank]
        start, end = starts[mine.start], starts[mine.stop]
        whole = self._of_image.new_empty(starts[-1], *of_row) if exchange.receives else None
        own = self._of_image.new_empty(end - start, *of_row) if whole is None else whole[start:end]
        with self._clock.running("forward"):
            self._encode_share(pixels, [kept[image] for image in mine], own)
        with self._clock.running(self._waiting):
            exchange.collect(own, whole, [0, *(starts[share.stop] for share in shares)])
        return whole

    def _dealt(self, batches: Sequence[Batch], num_images: int) -> torch.Tensor:
        """This rank's share of the step's images, uint8 [n, 3, h, w]."""
        exchange = self._exchange
        own = torch.empty(len(exchange.share(num_images)), *self._image_shape, dtype=torch.uint8, device=self._device)
        if exchange.rank:
            return exchange.deal(None, own)
        shares = [self._pixels(batches, exchange.share(num_images, rank)) for rank in range(exchange.num_ranks)]
        return exchange.deal(shares, own)

    def _pixels(self, batches: Sequence[Batch], images: range) -> torch.Tensor:
        """Of some of the step's images, on the device."""
        parts, start = [torch.empty(0, *self._image_shape, dtype=torch.uint8, device=self._device)], 0
        for batch in batches:
            if batch.pixels is not None:
                some = batch.pixels[max(images.start - start, 0) : max(images.stop - start, 0)]
                parts.append(some.to(self._device))
                start += len(batch.pixels)
        return torch.cat(parts)

    def _encode_share(self, pixels: torch.Tensor, kept: Sequence[torch.Tensor], own: torch.Tensor) -> None:
        """Writes into ``own`` the features of this rank's images, [n, t, d], or [v, d] of their ``kept`` tokens."""
        end = 0
        for start in range(0, len(pixels), IMAGES_AT_ONCE):
            features = self._encode_some(pixels[start : start + IMAGES_AT_ONCE])
            if self._keeps_some:
                some = enumerate(kept[start : start + len(features)])
                features = compress(features, torch.cat([tokens + n * self._num_tokens_in for n, tokens in some]))
            own[end : end + len(features)] = features
            end += len(features)

    @torch.no_grad()
    def _encode_some(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self._tower(pixels)
        return features


def build_spread_tower(
    resolved: Resolved,
    stage: ResolvedStage,
    chunks: Sequence[torch.nn.Module],
    compression: Compression,
    clock: StepClock,
) -> SpreadTower | None:
    """A stage's, of the tower in ``chunks``; None where it runs in the first stage's passes."""
    model = resolved.config.model
    if not resolved.spreads_vision or model.vision is None:
        return None
    chunk = unwrap(chunks[0])
    assert isinstance(chunk, MultimodalModel) and chunk.vision is not None
    return SpreadTower(
        chunk.vision, model.vision.image_size, stage.view_tokens, clock,
        keeps_some=compression.is_blind and model.qformer is None, keeps_pixels=resolved.first_stage_sees_pixels(stage),
    )  # fmt: skip


def kept_tokens(batch: Batch, num_tokens_in: int) -> Iterator[torch.Tensor]:
    """For each image of a micro-batch (with tiles each square) which of its own tokens stay, int64 [k]."""
    counts = torch.bincount(batch.visual_indices // num_tokens_in, minlength=batch.load.num_images)
    for number, tokens in enumerate(batch.visual_indices.split(counts.tolist())):
        yield tokens - number * num_tokens_in


def _given(batches: Sequence[Batch], features: torch.Tensor | None, starts: Sequence[int]) -> Iterator[Batch]:
    """Each micro-batch with its part of all ``features`` (None: not on this rank); ``starts``: where each image's rows begin."""
    image = 0
    for batch in batches:
        end = image + batch.load.num_images
        some = features is not None and end > image
        yield replace(batch, features=features[starts[image] : starts[end]] if features is not None and some else None)
        image = end
