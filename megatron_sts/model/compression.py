"""VTC within the model: features of images become the visual tokens that the decoder sees."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import distributed as dist

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.schema import VtcConfig
from megatron_sts.config.tokens import LOOKING
from megatron_sts.data.batch import Batch
from megatron_sts.mcore.groups import row_group
from megatron_sts.mcore.relay import PipelineRelay
from megatron_sts.vtc.compressor import compress
from megatron_sts.vtc.looking import LookingSampler, make_looking_sampler
from megatron_sts.vtc.pooled import pool
from megatron_sts.vtc.seen import SeenImages


class Compression:
    """How a stage compresses. Chosen before the projector where that needs no look at the image, else after it."""

    def __init__(self, vtc: VtcConfig | None, num_tokens_in: int, relay: PipelineRelay | None) -> None:
        """``relay``: for samplers that look, if what they choose decides positions, and other stages need these."""
        self._looking = None if vtc is None else make_looking_sampler(vtc)
        self._pools = vtc is not None and vtc.sampler == "pooled"
        self._moves = self._looking is not None and vtc is not None and vtc.positions == "original"
        self._num_tokens_in = num_tokens_in
        self._relay = relay

    @property
    def is_blind(self) -> bool:
        """Whether what is kept needs no look at any token, and no mean of several."""
        return self._looking is None and not self._pools

    def begin_step(self) -> None:
        """Before the first forward pass of a step."""
        if self._relay is not None:
            self._relay.begin_step()

    def close(self) -> None:
        """Ends what it waits with; a collective of the pipeline."""
        if self._relay is not None:
            self._relay.close()

    def positions(self, batch: Batch, chosen: torch.Tensor | None) -> torch.Tensor:
        """RoPE positions [b, s], once ``chosen`` [v] is known; None on stages that did not look."""
        if not (self._moves and self._drops(batch)):
            return batch.position_ids
        if chosen is None:
            assert self._relay is not None
            chosen = self._relay.receive(batch.number, len(batch.visual_indices), batch.tokens.device)
        elif self._relay is not None:
            self._relay.send(batch.number, chosen)
        # The batch has the positions of evenly spaced tokens; text does not move when others of its image are kept.
        moves = torch.zeros_like(batch.position_ids)
        return batch.position_ids + moves.masked_scatter(batch.is_visual, chosen - batch.visual_indices)

    def _drops(self, batch: Batch) -> bool:
        return len(batch.visual_indices) < len(batch.num_kept) * self._num_tokens_in

    def __call__(
        self, features: torch.Tensor, project: Callable[[torch.Tensor], torch.Tensor], batch: Batch, words: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Projected visual tokens [v, h] (with tiles those that are no newlines) and, where a sampler looked, which of the n x t they are, int64 [v].

        ``features`` [n, t, d], or [v, d] of what is kept; ``words``: embeddings of the micro-batch's tokens [s, b, h], for samplers that look.
        """
        if batch.is_newline is not None:
            kept = features if features.dim() == 2 else compress(features, batch.visual_indices)
            return arrange(project(kept), batch), None
        if features.dim() == 2:
            return project(features), None
        num_images, num_tokens_in, _ = features.shape
        if len(batch.visual_indices) == num_images * num_tokens_in:
            return project(features.flatten(0, 1)), None
        if self._pools:
            projected = project(features.flatten(0, 1)).view(num_images, num_tokens_in, -1)
            parts = [pool(projected[number : number + 1], count)[0] for number, count in enumerate(batch.num_kept)]
            return torch.cat(parts), None
        if self._looking is None:
            return project(compress(features, batch.visual_indices)), None
        projected = project(features.flatten(0, 1)).view(num_images, num_tokens_in, -1)
        chosen = choose(self._looking, projected, batch, words)
        return compress(projected, chosen), chosen


def arrange(projected: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Visual tokens of tiles, [f, h], of the ``projected`` features [p, h]: in reading order, interpolated in at least fp32.

    Sources are gathered row by row, in each of which they are distinct: so the backward pass adds in one order on any device.
    """
    assert batch.visual_sources is not None
    if batch.visual_weights is None:
        return projected.index_select(0, batch.visual_sources[0])
    dtype = torch.promote_types(projected.dtype, torch.float32)
    parts = (
        projected.index_select(0, sources).to(dtype) * weights.to(dtype).unsqueeze(1)
        for sources, weights in zip(batch.visual_sources, batch.visual_weights, strict=True)
    )
    return sum(parts, projected.new_zeros((), dtype=dtype)).to(projected.dtype)


def with_newlines(visual: torch.Tensor, newline: torch.Tensor, is_newline: torch.Tensor) -> torch.Tensor:
    """``visual`` [f, h], and the learned token ``newline`` [h] where ``is_newline`` [v] says so: [v, h]."""
    tokens = newline.to(visual.dtype).expand(len(is_newline), -1)
    return tokens.masked_scatter(~is_newline.unsqueeze(1), visual)


def build_compression(resolved: Resolved, spec: ResolvedStage) -> Compression:
    """How the stage compresses images; a collective where what it chooses must travel down the pipeline."""
    vtc, parallel = spec.config.vtc, resolved.config.parallel
    travels = vtc is not None and vtc.sampler in LOOKING and vtc.positions == "original"
    relay = PipelineRelay(parallel.timeout_s) if travels and parallel.pipeline_model_parallel_size > 1 else None
    return Compression(vtc, spec.visual_tokens_in, relay)


@torch.no_grad()
def choose(sampler: LookingSampler, projected: torch.Tensor, batch: Batch, words: torch.Tensor) -> torch.Tensor:
    """Kept tokens, int64 [v] into the n x t tokens of ``projected`` [n, t, h]; a collective of the tensor- and context-parallel ranks.

    Scores that differ by rounding alone must not let these ranks keep different tokens: the first one decides.
    """
    assert batch.pixels is not None
    num_tokens_in = projected.shape[1]
    rows, asked = instructions(batch)
    images = SeenImages(projected, batch.pixels, words.transpose(0, 1)[rows], asked)
    chosen: list[torch.Tensor] = [torch.empty(0)] * len(batch.num_kept)
    for count in sorted(set(batch.num_kept)):
        which = [number for number, kept in enumerate(batch.num_kept) if kept == count]
        found = sampler.select(images.rows(which), count)
        for number, tokens in zip(which, found, strict=True):
            chosen[number] = tokens + number * num_tokens_in
    indices = torch.cat(chosen)
    group = row_group()
    dist.broadcast(indices, src=dist.get_global_rank(group, 0), group=group)
    return indices


def instructions(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """For each image its row [n], and which of the row's tokens are words of its sample's user, bool [n, s]."""
    starts = list(accumulate(batch.num_kept, initial=0))[:-1]
    rows, columns = batch.is_visual.nonzero(as_tuple=True)
    rows, columns = rows[starts], columns[starts]
    return rows, batch.is_instruction[rows] & (batch.segments[rows] == batch.segments[rows, columns].unsqueeze(1))
