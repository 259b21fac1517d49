"""Prepared samples become one ``Batch`` of rows of one length. Knows no source and no template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from megatron_sts.config.tiles import kept_counts
from megatron_sts.config.tokens import round_up
from megatron_sts.cost.flops import TokenLoad
from megatron_sts.data.batch import Batch
from megatron_sts.data.packing import describe_packing
from megatron_sts.data.template import EncodedSample
from megatron_sts.vtc.tiles import Arrangement, join_arrangements


@dataclass(frozen=True)
class PreparedSample:
    """An encoded sample with its images decoded, its kept tokens and its positions."""

    encoded: EncodedSample
    position_ids: torch.Tensor
    """int64 [length]."""
    visual_indices: tuple[torch.Tensor, ...]
    """For each image the kept tokens, int64 [k]."""
    visual_tokens_in: int
    """Tokens of an image before VTC; with tiles features of a view."""
    pixels: tuple[np.ndarray, ...] | None
    """uint8 [h, w, 3] each, with tiles those of all views; None on ranks that use none."""
    is_truncated: bool = False
    """The end of the conversation was left out."""
    arrangements: tuple[Arrangement, ...] = ()
    """Tiles: of each image its tokens, whose places ``visual_indices`` has too."""

    @property
    def length(self) -> int:
        """Tokens after VTC."""
        return len(self.encoded.tokens)

    @property
    def num_kept(self) -> int:
        """Visual tokens after VTC."""
        return sum(len(indices) for indices in self.visual_indices)

    @property
    def num_dropped(self) -> int:
        """Visual tokens that VTC leaves out."""
        if self.arrangements:
            return sum(one.picture.num_tokens for one in self.arrangements) - self.num_kept
        return len(self.visual_indices) * self.visual_tokens_in - self.num_kept

    @property
    def num_views(self) -> int:
        """Squares that the tower sees."""
        return sum(one.picture.num_views for one in self.arrangements) or len(self.visual_indices)

    @property
    def num_projected(self) -> int:
        """Features of which kept tokens are made."""
        return sum(one.num_projected for one in self.arrangements) if self.arrangements else self.num_kept

    @property
    def num_projected_in(self) -> int:
        """The same without VTC."""
        if self.arrangements:
            return sum(sum(kept_counts(one.picture, None, (1.0,))[1]) for one in self.arrangements)
        return self.num_kept + self.num_dropped


Row = Sequence[PreparedSample]
"""The samples of one row, in order; none: padding only."""


def collate(
    rows: Sequence[Row],
    *,
    sequence_length: int,
    dense_length: int | None,
    pad_id: int,
    packed: bool,
    sample_multiple: int = 1,
    num_context_ranks: int = 1,
    projects_all: bool = False,
) -> Batch:
    """Right-pads rows to [b, sequence_length]. All tensors on the CPU.

    Args:
        rows: without ``packed`` at most one sample each.
        sequence_length: of every row.
        dense_length: what rows would be padded to without VTC; None: longer by what VTC drops from each.
        pad_id: token id of padding.
        packed: several samples share a row, and each attends to itself alone.
        sample_multiple: tokens that a packed sample takes a multiple of, the last ones of its segment padding.
        num_context_ranks: that share each packed row.
        projects_all: the projector computes dropped tokens too.
    """
    shape, multiple = (len(rows), sequence_length), sample_multiple if packed else None
    batch = Batch(
        tokens=torch.full(shape, pad_id, dtype=torch.int64),
        labels=torch.full(shape, pad_id, dtype=torch.int64),
        loss_mask=torch.zeros(shape, dtype=torch.float32),
        position_ids=torch.zeros(shape, dtype=torch.int64),
        is_visual=torch.zeros(shape, dtype=torch.bool),
        is_instruction=torch.zeros(shape, dtype=torch.bool),
        segments=torch.zeros(shape, dtype=torch.int32),
        packing=None,
        visual_indices=_flat_indices(rows),
        num_kept=tuple(len(kept) for row in rows for sample in row for kept in sample.visual_indices),
        num_placeholders=sum(sum(sample.encoded.is_visual) for row in rows for sample in row),
        pixels=_stack_pixels(rows),
        num_samples=sum(map(len, rows)),
        num_truncated=sum(sample.is_truncated for row in rows for sample in row),
        num_tokens=sum(sample.length for row in rows for sample in row),
        load=_load(rows, [sequence_length] * len(rows), multiple, dense=False, projects_all=projects_all),
        dense_load=_load(
            rows, _dense_lengths(rows, sequence_length, dense_length), multiple, dense=True, projects_all=True
        ),
    )
    batch = _with_arrangements(batch, rows)
    for number, row in enumerate(rows):
        start = 0
        for segment, sample in enumerate(row, start=1):
            end = start + round_up(sample.length, multiple or 1)
            _write(batch, number, start, sample)
            batch.segments.numpy()[number, start:end] = segment
            start = end
    return replace(batch, packing=describe_packing(batch.segments, num_context_ranks)) if packed else batch


def _write(batch: Batch, row: int, start: int, sample: PreparedSample) -> None:
    """Through arrays that share the tensors' memory: for rows this short torch would take eight times as long."""
    encoded, here, inner = sample.encoded, slice(start, start + sample.length), slice(start, start + sample.length - 1)
    batch.tokens.numpy()[row, here] = encoded.tokens
    batch.labels.numpy()[row, inner] = encoded.tokens[1:]
    batch.loss_mask.numpy()[row, inner] = encoded.is_target[1:]
    batch.position_ids.numpy()[row, here] = sample.position_ids.numpy()
    batch.is_visual.numpy()[row, here] = encoded.is_visual
    batch.is_instruction.numpy()[row, here] = encoded.is_instruction


def _with_arrangements(batch: Batch, rows: Sequence[Row]) -> Batch:
    """With tiles, which features are projected and what becomes of them."""
    samples = [sample for row in rows for sample in row if sample.arrangements]
    if not samples:
        return batch
    joined = join_arrangements([one for sample in samples for one in sample.arrangements], samples[0].visual_tokens_in)
    return replace(
        batch,
        visual_indices=torch.from_numpy(joined.features),
        visual_sources=torch.from_numpy(joined.sources),
        visual_weights=None if joined.weights is None else torch.from_numpy(joined.weights),
        is_newline=torch.from_numpy(joined.is_newline),
    )


def _flat_indices(rows: Sequence[Row]) -> torch.Tensor:
    found = [torch.empty(0, dtype=torch.int64)]
    for sample in (sample for row in rows for sample in row):
        # Every earlier tensor but the empty one is an image.
        found += [(len(found) - 1 + i) * sample.visual_tokens_in + kept for i, kept in enumerate(sample.visual_indices)]
    return torch.cat(found)


def _dense_lengths(rows: Sequence[Row], sequence_length: int, dense_length: int | None) -> list[int]:
    if dense_length is not None:
        return [dense_length] * len(rows)
    return [sequence_length + sum(sample.num_dropped for sample in row) for row in rows]


def _load(
    rows: Sequence[Row], lengths: Sequence[int], multiple: int | None, *, dense: bool, projects_all: bool
) -> TokenLoad:
    """``multiple``: of a packed sample's tokens; None: a row attends to itself as a whole."""
    samples = [sample for row in rows for sample in row]
    pairs = sum(length**2 for length in lengths)
    if multiple is not None:
        pairs = 0
        for row, length in zip(rows, lengths, strict=True):
            parts = [round_up(sample.length, multiple) + (sample.num_dropped if dense else 0) for sample in row]
            pairs += sum(part**2 for part in [*parts, length - sum(parts)])
    return TokenLoad(
        num_tokens=sum(lengths),
        num_pairs=pairs,
        num_images=sum(sample.num_views for sample in samples),
        num_visual_tokens=sum(sample.num_kept + (sample.num_dropped if dense else 0) for sample in samples),
        num_projected_tokens=sum(
            sample.num_projected_in if projects_all else sample.num_projected for sample in samples
        ),
    )


def _stack_pixels(rows: Sequence[Row]) -> torch.Tensor | None:
    images = [image for row in rows for sample in row for image in sample.pixels or ()]
    if not images:
        return None
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
