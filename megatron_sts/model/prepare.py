"""Records become the model's micro-batches: encoding, the choice of visual tokens, images. Must not know which records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.data.batch import Batch
from megatron_sts.data.collate import PreparedSample, collate
from megatron_sts.data.image import fit_square
from megatron_sts.data.records import BadSampleError, Record, SkippedSample
from megatron_sts.data.template import EncodedSample, encode, load_tokenizer
from megatron_sts.data.tokenizer import Tokenizer
from megatron_sts.vtc.positions import position_ids
from megatron_sts.vtc.samplers import UniformSampler, make_sampler


class BatchPreparer:
    """Encodes records, chooses kept visual tokens and collates, for one stage's static shapes."""

    def __init__(self, resolved: Resolved, stage: ResolvedStage, *, needs_pixels: bool, checks_pixels: bool) -> None:
        vtc, vision = stage.config.vtc, resolved.config.model.vision
        self.tokenizer = _tokenizer_for(stage, resolved.config.model.language.vocab_size)
        self._stage = stage
        self._image_size = vision.image_size if vision else 0
        self._sampler = make_sampler(vtc, resolved.config.seed, stage.index) if vtc else UniformSampler()
        self._positions = vtc.positions if vtc else "original"
        self._needs_pixels, self._checks_pixels = needs_pixels, checks_pixels

    def batch(self, records: Sequence[tuple[int, Record | SkippedSample | None]]) -> Batch:
        """One micro-batch from (sample index, record) pairs; None and skipped samples become rows of padding."""
        stage = self._stage
        skipped: list[SkippedSample] = []
        prepared = [self._prepare(index, record, skipped) for index, record in records]
        batch = collate(prepared, stage.sequence_length, self.tokenizer.pad_id, stage.visual_tokens_out)
        return replace(batch, skipped=tuple(skipped))

    def _prepare(
        self, index: int, record: Record | SkippedSample | None, skipped: list[SkippedSample]
    ) -> PreparedSample | None:
        """A row; None where there is none, and then ``skipped`` says why."""
        stage = self._stage
        if isinstance(record, SkippedSample):
            skipped.append(record)
        if not isinstance(record, Record):
            return None
        try:
            encoded = encode(record, self.tokenizer, stage.data.template, stage.visual_tokens_out)
            if len(encoded.tokens) > stage.sequence_length:
                raise BadSampleError(
                    f"{len(encoded.tokens)} tokens exceed the stage's {stage.sequence_length} "
                    f"(stages.{stage.name}.batch.sequence_length={stage.config.batch.sequence_length})"
                )
        except BadSampleError as error:
            skipped.append(SkippedSample(record.key, str(error)))
            return None
        return self._with_images(index, record, encoded, skipped)

    def _with_images(
        self, index: int, record: Record, encoded: EncodedSample, skipped: list[SkippedSample]
    ) -> PreparedSample:
        stage = self._stage
        keys = [(index, number) for number in range(encoded.num_images)]
        kept = torch.empty(0, stage.visual_tokens_out, dtype=torch.int64)
        if keys:
            kept = self._sampler.indices(keys, stage.visual_tokens_in, stage.visual_tokens_out)
        places = position_ids(torch.tensor(encoded.is_visual), kept, stage.visual_tokens_in, self._positions)
        pixels, is_bad = None, False
        if self._needs_pixels or self._checks_pixels:
            pixels = []
            try:
                pixels = [fit_square(decode(), self._image_size) for decode in record.images]
            except BadSampleError as error:
                skipped.append(SkippedSample(record.key, str(error)))
                # The placeholders stay, because shapes must agree on all stages; they show a black image without loss.
                blank = torch.zeros(self._image_size, self._image_size, 3, dtype=torch.uint8).numpy()
                pixels, is_bad = [blank] * encoded.num_images, True
        return PreparedSample(encoded, places, kept, tuple(pixels) if self._needs_pixels and pixels else None, is_bad)


def _tokenizer_for(stage: ResolvedStage, vocab_size: int) -> Tokenizer:
    """The stage's tokenizer; refused if it has ids beyond the vocabulary, which tensor-parallel embeddings take for zeros."""
    tokenizer = load_tokenizer(stage.data.tokenizer, stage.data.template)
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"model.language.vocab_size={vocab_size}: tokenizer {stage.data.tokenizer} of stage {stage.name} has "
            f"{tokenizer.vocab_size} ids with <image> and the pieces of template {stage.data.template}; raise it"
        )
    return tokenizer
