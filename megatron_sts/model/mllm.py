"""The multimodal model: vision tower -> [Q-Former] -> VTC -> projector -> merge -> decoder. One instance is one pipeline chunk."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch.nn import functional

from megatron_sts.config.resolve import Resolved
from megatron_sts.data.batch import Batch
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore.context import all_images, own_images, own_tokens
from megatron_sts.mcore.decoder import build_decoder, run_decoder
from megatron_sts.mcore.module import PipelineChunk
from megatron_sts.mcore.vision import build_projector, without_drawing
from megatron_sts.model.compression import Compression, with_newlines
from megatron_sts.model.merge import merge_visual
from megatron_sts.vision.qformer import QFormer
from megatron_sts.vision.tower import HuggingFaceTower, VisionTower, build_tower
from megatron_sts.vtc.compressor import compress


class MultimodalModel(PipelineChunk):
    """LLaVA- or MiniGPT-4-style model. Vision tower, Q-Former and projector live in the chunk with the embedding."""

    def __init__(
        self, resolved: Resolved, gate: SkipGate, *, pre_process: bool, post_process: bool, vp_stage: int | None
    ) -> None:
        super().__init__(
            build_decoder(resolved, gate, pre_process=pre_process, post_process=post_process, vp_stage=vp_stage)
        )
        self.pre_process = pre_process
        self.post_process = post_process
        self.awaited = resolved.config.parallel.overlap_grad_reduce
        """Whether other ranks wait for the gradients of tower and projector in every micro-batch."""
        self.compression = Compression(None, 0, None)
        """The stage's; ``train.stage`` sets it."""
        self.vision: VisionTower | HuggingFaceTower | None = None
        self.qformer: QFormer | None = None
        model = resolved.config.model
        if resolved.spreads_vision and not vp_stage:
            self.held_by_all = ("vision",)
            with nullcontext() if pre_process else without_drawing():
                self.vision = build_tower(resolved)
        if pre_process and model.vision is not None:
            if self.vision is None:
                self.vision = build_tower(resolved)
            self.qformer = QFormer(resolved) if model.qformer is not None else None
            self.projector = build_projector(resolved)
            self.image_size = model.vision.image_size
            self.has_newline = model.vision.tiles is not None
            self.vision_multiple = max(stage.visual_multiple for stage in resolved.stages)

    def forward(self, batch: Batch, labels: torch.Tensor | None) -> torch.Tensor:
        """Per-token losses [b, s] or, without labels, logits [b, s, vocab / tp] on the last stage; else hidden [s, b, h].

        Batch and labels have whole rows; what is returned has this rank's s tokens of each.
        """
        embeddings, chosen = self.embed(batch) if self.pre_process else (None, None)
        position_ids = self.compression.positions(batch, chosen)
        packing = batch.packing
        if labels is not None:
            labels = own_tokens(labels, 1, packing)
        tokens, position_ids = own_tokens(batch.tokens, 1, packing), own_tokens(position_ids, 1, packing)
        return run_decoder(self.language, tokens, position_ids, packing, embeddings, labels)

    def embed(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The decoder's input [s, b, h], text embeddings with the images merged in; and ``see``'s choice.

        Every context-parallel rank merges whole rows and goes on with its own tokens. So the projector and the embedding have
        the gradients of these alone, and the sum over the ranks counts none twice.
        """
        words = self.language.embedding(input_ids=batch.tokens, position_ids=batch.position_ids)
        embeddings, chosen = words, None
        if self.vision is not None:
            if batch.num_kept:
                visual, chosen = self.see(batch, words)
                embeddings = merge_visual(words, visual, batch.is_visual, batch.num_placeholders)
            elif self.awaited and torch.is_grad_enabled():
                embeddings = words + self.see_nothing(batch)
        return self.to_sequence_parallel(own_tokens(embeddings, 0, batch.packing)), chosen

    def see(self, batch: Batch, words: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The micro-batch's visual tokens [v, h], and which a sampler chose; ``words``: embeddings of its tokens [s, b, h]."""
        visual, chosen = self.compression(self.features(batch.pixels, batch.features), self.project, batch, words)
        if batch.is_newline is not None:
            visual = with_newlines(visual, self.projector.newline, batch.is_newline)
        return visual, chosen

    def see_nothing(self, batch: Batch) -> torch.Tensor:
        """A zero that depends on tower, Q-Former and projector.

        In an overlapped reduction their gradients must become ready without an image too, or ranks that had one would wait.
        """
        blank = torch.zeros(1, 3, self.image_size, self.image_size, dtype=torch.uint8, device=batch.tokens.device)
        few_tokens = torch.arange(self.vision_multiple, device=batch.tokens.device)
        nothing = 0.0 * self.project(compress(self.features(blank), few_tokens)).sum()
        return nothing + 0.0 * self.projector.newline.sum() if self.has_newline else nothing

    def features(self, pixels: torch.Tensor | None, encoded: torch.Tensor | None = None) -> torch.Tensor:
        """``pixels`` [n, 3, h, w] -> the features [n, t, d] of the tower, or of the Q-Former that follows it.

        ``encoded``: what the tower gave before the step (``Batch.features``), if it did. Context-parallel ranks share the images
        out: the gradients of tower and Q-Former are those of a rank's own images.
        """
        if self.qformer is None and encoded is not None:
            return encoded
        if encoded is None:
            assert self.vision is not None and pixels is not None
            own, num_images = run_part(self.vision, own_images(pixels)), len(pixels)
        else:
            own, num_images = own_images(encoded), len(encoded)
        if self.qformer is not None:
            own = run_part(self.qformer, own)
        return all_images(own, num_images)

    def project(self, features: torch.Tensor) -> torch.Tensor:
        """``features`` [v, d] -> [v, h]."""
        num_tokens, num_missing = len(features), -len(features) % self.vision_multiple
        if self.has_newline and num_missing:  # of tiles any number may be visible
            features = functional.pad(features, (0, 0, 0, num_missing))
        projected: torch.Tensor = self.projector(features.unsqueeze(1))
        return projected.squeeze(1)[:num_tokens]


def run_part(part: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """``part(inputs)``; nothing is kept for a backward pass that would reach nothing that learns."""
    learns = inputs.requires_grad or any(parameter.requires_grad for parameter in part.parameters())
    with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
        outputs: torch.Tensor = part(inputs)
    return outputs
