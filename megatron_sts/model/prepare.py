"""Records become rows of the model's micro-batches: encoding, the choice of visual tokens, images. Knows no sources."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.tokens import BEFORE_PROJECTOR, TokenCounts
from megatron_sts.cost.flops import TokenLoad
from megatron_sts.data.batch import Batch
from megatron_sts.data.collate import PreparedSample, Row, collate
from megatron_sts.data.records import BadSampleError, Record
from megatron_sts.data.template import EncodedSample, encode, encode_prompt, tokenizer_of
from megatron_sts.data.truncation import truncated
from megatron_sts.model.images import SampleImages, Squares, cut
from megatron_sts.vision.tower import fitting_of
from megatron_sts.vtc.positions import position_ids
from megatron_sts.vtc.samplers import UniformSampler, make_sampler


class BatchPreparer:
    """Encodes records, chooses kept visual tokens and collates, for one stage."""

    def __init__(self, resolved: Resolved, stage: ResolvedStage, *, needs_pixels: bool) -> None:
        vtc, vision = stage.config.vtc, resolved.config.model.vision
        self.tokenizer = tokenizer_of(stage, resolved.config.model.language.vocab_size)
        self._stage = stage
        self._num_context_ranks = resolved.config.parallel.context_parallel_size
        self._fitting = fitting_of(vision) if vision else None
        self._vision, self._draws = vision, (resolved.config.seed, stage.index)
        self._sampler = make_sampler(vtc, resolved.config.seed, stage.index) if vtc else UniformSampler()
        self._projects_all = vtc is not None and vtc.sampler not in BEFORE_PROJECTOR
        self._positions = vtc.positions if vtc else "original"
        self._needs_pixels = needs_pixels and self._fitting is not None  # a model without eyes is asked in words

    def prepare(self, index: int, record: Record, counts: TokenCounts) -> PreparedSample:
        """A sample with the visual tokens that ``counts`` keeps; ``index`` tells it from the others in random choices.

        Raises:
            BadSampleError: it cannot be used.
        """
        if record.images and not self._stage.visual_tokens_in:
            raise BadSampleError("an image, but model.vision is null")
        data, max_tokens = self._stage.data, counts.sequence_length

        images = self._images(index, record, counts)

        def encoding(conversation: Record) -> EncodedSample:
            return encode(conversation, self.tokenizer, data.template, images.num_kept)

        encoded, shorter = encoding(record), None
        if len(encoded.tokens) > max_tokens and data.too_long == "truncate":
            shorter = truncated(record, max_tokens, encoding)
        prepared = self._prepared(images, shorter or encoded, counts)
        return prepared if shorter is None else replace(prepared, is_truncated=True)

    def prepare_prompt(self, index: int, record: Record, counts: TokenCounts) -> PreparedSample:
        """As ``prepare`` for a record that ends with the user's turn: what the model reads before it answers."""
        images = self._images(index, record, counts)
        encoded = encode_prompt(record, self.tokenizer, self._stage.data.template, images.num_kept)
        return self._prepared(images, encoded, counts)

    def length(self, record: Record, counts: TokenCounts, *, is_prompt: bool) -> int:
        """Tokens of a record, however many a row may have; with tiles its pictures are decoded for it.

        Raises:
            BadSampleError: it cannot be used.
        """
        images = self._images(0, record, counts)
        encoding = encode_prompt if is_prompt else encode
        return len(encoding(record, self.tokenizer, self._stage.data.template, images.num_kept).tokens)

    def load(self, record: Record, counts: TokenCounts) -> TokenLoad:
        """What a record asks of the model in a row without padding, without a look at its pictures; nothing if that tells already that
        it cannot be used. Not for tiles, whose number a picture's size decides; of padded rows, all as long, without their tokens.
        """
        stage, images = self._stage, range(len(record.images))
        if images and not stage.visual_tokens_in:
            return TokenLoad()
        num_tokens = 0
        if stage.config.batch.packing != "pad":
            try:
                num_tokens = self.length(record, counts, is_prompt=False)
            except BadSampleError:
                return TokenLoad()
            if num_tokens > counts.sequence_length:
                if stage.data.too_long == "skip":
                    return TokenLoad()
                num_tokens = counts.sequence_length
        kept, all_in = (sum(each.of_image(number) for number in images) for each in (counts, stage.uncompressed))
        return TokenLoad(num_tokens, num_tokens**2, len(images), kept, all_in if self._projects_all else kept)

    def _prepared(self, images: SampleImages, encoded: EncodedSample, counts: TokenCounts) -> PreparedSample:
        stage = self._stage
        if (excess := len(encoded.tokens) - counts.sequence_length) > 0:
            cut = "set data.too_long=truncate"
            if stage.data.too_long == "truncate":
                cut = "shorten it: no answer behind all images ends early enough to cut there"
            length = stage.config.batch.sequence_length
            raise BadSampleError(
                f"{len(encoded.tokens)} tokens exceed the stage's {counts.sequence_length}; raise "
                f"stages.{stage.name}.batch.sequence_length={length} to {length + excess}, or {cut}"
            )
        kept = images.kept
        is_visual = torch.from_numpy(np.array(encoded.is_visual, dtype=bool))
        places = position_ids(is_visual, kept, images.counts_in, self._positions)
        pixels = images.pixels() if self._needs_pixels else None
        return PreparedSample(encoded, places, kept, stage.view_tokens, pixels, arrangements=images.arrangements)

    def _images(self, index: int, record: Record, counts: TokenCounts) -> SampleImages:
        """Those of a record.

        Raises:
            BadSampleError: one cannot be decoded; with tiles only, else when its pixels are asked for.
        """
        if self._vision is None or self._fitting is None or self._fitting.tiles is None:
            num_in = self._stage.visual_tokens_in
            return Squares(index, record.images, counts, num_in, self._sampler, self._fitting)
        vtc, ratios = self._stage.config.vtc, counts.keep_ratios
        return cut(index, record.images, ratios, vision=self._vision, fitting=self._fitting, vtc=vtc, draws=self._draws)

    def collate(self, rows: Sequence[Row], counts: TokenCounts, *, longest: int | None = None) -> Batch:
        """One micro-batch; with ``packing: none`` its rows are padded to ``longest`` only."""
        batch, uncompressed = self._stage.config.batch, self._stage.uncompressed.sequence_length
        return collate(
            rows,
            sequence_length=counts.sequence_length if longest is None else longest,
            dense_length=uncompressed if batch.packing == "pad" else None,
            pad_id=self.tokenizer.pad_id,
            packed=batch.packing == "pack",
            sample_multiple=self._stage.sample_multiple,
            num_context_ranks=self._num_context_ranks,
            projects_all=self._projects_all,
        )
