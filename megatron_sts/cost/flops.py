"""FLOPs of the whole model, never of one pipeline stage, from shapes alone. Torch-free; knows nothing of time.

Conventions, all of them: a product [m, k] x [k, n] is 2mkn FLOPs; only matrix products count (norms, activations,
softmax, rotary and the optimizer do not); causal attention counts half of the s x s score matrix unless ``"full"`` is
asked for; activation recomputation is not counted (these are model FLOPs, as in MFU); a skipped layer costs nothing.
Published TFLOP/s use both attention conventions: name yours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, get_args

from megatron_sts.config.architecture import LanguageConfig, ModelConfig, Part, QFormerConfig, VisionConfig
from megatron_sts.config.checks import IMAGE_MODES
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.tokens import BEFORE_PROJECTOR, TokenCounts

Causal = Literal["half", "full"]
"""Share of the score matrix that counts in causal attention."""


@dataclass(frozen=True)
class Flops:
    """Forward FLOPs of one piece of the model."""

    weights: int
    """Products with a weight matrix."""
    attention: int = 0
    """Products of two activations: scores, and scores times values."""

    @property
    def forward(self) -> int:
        """All of them."""
        return self.weights + self.attention

    def training(self, *, trains: bool, gradient_passes: bool) -> int:
        """Forward and backward: 1x a weight gradient, 1x an input gradient, where they are needed.

        Attention has two operands that both need a gradient: 2x in the backward pass.
        """
        passes = self.weights + 2 * self.attention if gradient_passes else 0
        return self.forward + passes + (self.weights if trains else 0)


@dataclass(frozen=True)
class ForwardFlops:
    """Forward FLOPs of one micro-batch, by piece, in the order in which data pass."""

    patch_embedding: Flops
    vision_layers: Flops
    """All layers up to the projected one."""
    qformer_in: Flops
    """The Q-Former's keys and values of visual features."""
    qformer: Flops
    """What the Q-Former computes with its queries."""
    projector_in: Flops
    """The matrix that reads the features of tower or Q-Former."""
    projector_out: Flops
    """The second matrix of an MLP projector; 0 for a linear one."""
    decoder_layer: Flops
    """One decoder layer."""
    head: Flops


@dataclass(frozen=True)
class TokenLoad:
    """What a batch asks of the model. Loads of batches add up."""

    num_tokens: int = 0
    """Tokens of all rows, padding included."""
    num_pairs: int = 0
    """Query-key pairs without the causal mask: the squared lengths of what attends to itself, summed."""
    num_images: int = 0
    """Squares that the tower sees: with tiles an image is several."""
    num_visual_tokens: int = 0
    """Those of ``num_tokens`` that are images'."""
    num_projected_tokens: int = 0
    """What the projector computes: samplers that look need all tokens of an image; newline tokens need none."""

    def __add__(self, other: TokenLoad) -> TokenLoad:
        return TokenLoad(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def forward_flops(
    model: ModelConfig, load: TokenLoad, *, num_vision_layers: int, causal: Causal = "half"
) -> ForwardFlops:
    """Forward FLOPs of a batch.

    Args:
        model: the architecture.
        load: tokens and images of the batch.
        num_vision_layers: layers of the tower that run (``Resolved.num_vision_layers``).
        causal: how much of the decoder's score matrix counts.
    """
    language, vision, num_images, projected = model.language, model.vision, load.num_images, load.num_projected_tokens
    nothing = Flops(0)
    is_mlp = model.projector.type == "mlp2x_gelu"
    qformer_in, qformer = nothing, nothing
    if vision is not None and model.qformer is not None:
        qformer_in, qformer = _qformer(model.qformer, vision, num_images)
    features = model.qformer or vision
    return ForwardFlops(
        patch_embedding=nothing if vision is None else Flops(num_images * _patch_embedding(vision)),
        vision_layers=nothing if vision is None else _vision_layers(vision, num_images, num_vision_layers),
        qformer_in=qformer_in,
        qformer=qformer,
        projector_in=nothing
        if features is None
        else Flops(2 * projected * features.hidden_size * language.hidden_size),
        projector_out=Flops(2 * projected * language.hidden_size**2) if vision is not None and is_mlp else nothing,
        decoder_layer=_decoder_layer(language, load, causal),
        head=Flops(2 * load.num_tokens * language.hidden_size * language.vocab_size),
    )


@dataclass(frozen=True)
class StepWork:
    """Training FLOPs of one global step, over all ranks, by where they are spent."""

    tower: int
    """The vision tower: on the first pipeline rank, or spread over all ranks of a model copy."""
    qformer: int
    """On the first pipeline rank."""
    projector: int
    """On the first pipeline rank."""
    layer: int
    """One decoder layer that runs in every micro-batch."""
    after: int
    """The head: on the last pipeline rank."""

    @property
    def before(self) -> int:
        """All that comes before the decoder."""
        return self.tower + self.qformer + self.projector


def step_work(resolved: Resolved, stage: ResolvedStage, load: TokenLoad, *, causal: Causal = "half") -> StepWork:
    """Training FLOPs of one global step, over all ranks. What context-parallel ranks compute alike counts once.

    A piece computes its weight gradient if its part trains, and its input gradient if anything that trains lies
    before it: the frozen decoder of alignment passes gradients on, the frozen tower computes none. It does so in every
    micro-batch, also in one without images, in which nothing that learns may lie before it and no backward pass runs.

    Args:
        resolved: the run.
        stage: which stage; its freeze list applies.
        load: of the global batch.
        causal: how much of the decoder's score matrix counts.
    """
    pieces = forward_flops(resolved.config.model, load, num_vision_layers=resolved.num_vision_layers, causal=causal)
    vision, qformer, projector, language = (_trains(resolved, stage, part) for part in get_args(Part))
    before_projector = vision or qformer
    before_decoder = before_projector or projector or language  # the word embedding is part of the language model
    return StepWork(
        tower=pieces.patch_embedding.training(trains=vision, gradient_passes=False)
        + pieces.vision_layers.training(trains=vision, gradient_passes=vision),
        qformer=pieces.qformer_in.training(trains=qformer, gradient_passes=vision)
        + pieces.qformer.training(trains=qformer, gradient_passes=before_projector),
        projector=pieces.projector_in.training(trains=projector, gradient_passes=before_projector)
        + pieces.projector_out.training(trains=projector, gradient_passes=before_projector or projector),
        layer=pieces.decoder_layer.training(trains=language, gradient_passes=before_decoder),
        after=pieces.head.training(trains=language, gradient_passes=before_decoder),
    )


def work_besides_layers(resolved: Resolved, stage: ResolvedStage, work: StepWork) -> tuple[float, float]:
    """What a rank of the first and one of the last pipeline stage compute in passes besides decoder layers, in units of their part of
    one layer.

    Context-parallel ranks share out the tokens of layers and head, the tower by whole images of a micro-batch, and the projector
    not at all: each has all of its visual tokens. A tower that is spread runs before the passes, on all ranks alike.
    """
    size, batch = resolved.config.parallel.context_parallel_size, stage.config.batch
    num_images = batch.micro_batch_size * stage.num_views
    before_projector = work.qformer + (0 if resolved.spreads_vision else work.tower)
    towers = before_projector * size * -(-num_images // size) // num_images
    return (towers + size * work.projector) / work.layer, work.after / work.layer


def step_flops(
    resolved: Resolved, stage: ResolvedStage, load: TokenLoad, *, layers_executed: float, causal: Causal = "half"
) -> int:
    """``step_work`` of a step in which ``layers_executed`` decoder layers ran, in the mean over micro-batches."""
    work = step_work(resolved, stage, load, causal=causal)
    return work.before + round(layers_executed * work.layer) + work.after


def rank_flops(
    resolved: Resolved,
    stage: ResolvedStage,
    load: TokenLoad,
    layer_runs: Sequence[float],
    *,
    pp_rank: int,
    causal: Causal = "half",
) -> float:
    """One rank's share of a step's training FLOPs; over all ranks they come to ``step_flops``.

    Args:
        resolved: the run.
        stage: which stage.
        load: of the rank's copy of the model, all micro-batches.
        layer_runs: micro-batches in which each decoder layer ran.
        pp_rank: its pipeline rank. Tensor- and context-parallel ranks share equally, and with a tower that is spread all ranks of a
            copy its images.
        causal: how much of the decoder's score matrix counts.
    """
    work, parallel = step_work(resolved, stage, load, causal=causal), resolved.config.parallel
    own = sum(count for count, owner in zip(layer_runs, resolved.layer_owner, strict=True) if owner == pp_rank)
    num_stages, spread = parallel.pipeline_model_parallel_size, work.tower if resolved.spreads_vision else 0
    flops = own / stage.num_microbatches * work.layer + spread / num_stages
    if pp_rank == 0:
        flops += work.before - spread
    if pp_rank + 1 == num_stages:
        flops += work.after
    return flops / (parallel.tensor_model_parallel_size * parallel.context_parallel_size)


def planned_load(resolved: Resolved, stage: ResolvedStage, counts: TokenCounts) -> TokenLoad:
    """A global batch of full rows with as many images as the stage can hold, with tiles of the size with most tokens."""
    batch, vtc = stage.config.batch, stage.config.vtc
    has_images = resolved.config.model.vision is not None and shows_images(stage)
    numbers = range(stage.num_images if has_images else 0)
    visual, visual_in = (sum(each.of_image(number) for number in numbers) for each in (counts, stage.uncompressed))
    rows, length = batch.global_batch_size, counts.sequence_length
    if batch.packing == "none":
        length -= visual_in - visual
    projected = visual if vtc is None or vtc.sampler in BEFORE_PROJECTOR else visual_in
    if stage.pictures:
        projected = sum(counts.projected_tokens) if has_images else 0
    num_views = stage.num_views if has_images else 0
    return TokenLoad(rows * length, rows * length**2, rows * num_views, rows * visual, rows * projected)


def shows_images(stage: ResolvedStage) -> bool:
    """Whether its samples may have images, if the model has a tower."""
    return stage.data.source != "scenes" or stage.data.mode in IMAGE_MODES


def device_peak_tflops(device_name: str, dtype: str) -> float | None:
    """Peak dense matrix TFLOP/s of a device by the name that the CUDA driver gives it; None if unknown.

    ``dtype`` is ``"bf16"`` or ``"fp8"``; fp32 has no peak here. A MIG slice is unknown: it has a fraction of its device's units.
    """
    if "MIG" in device_name:
        return None
    for pattern, bf16, fp8 in _PEAK_TFLOPS:
        if re.search(pattern, device_name):
            return {"bf16": bf16, "fp8": fp8}.get(dtype)
    return None


# NVIDIA data sheets (A100 2021, H100 2023, H200 2024): tensor-core peaks; those sheets quote Hopper with 2:4 sparsity,
# here halved. An H100 or H200 named without a form factor is the SXM module. First match counts.
_PEAK_TFLOPS: tuple[tuple[str, float, float | None], ...] = (
    (r"\bH100 PCIe\b", 756.5, 1513.0),
    (r"\bH[12]00 NVL\b", 835.5, 1670.5),
    (r"\bH[12]00\b", 989.5, 1979.0),
    (r"\bA100\b", 312.0, None),
)


def _trains(resolved: Resolved, stage: ResolvedStage, part: Part) -> bool:
    """Whether the model has a part and it learns in this stage."""
    return part in resolved.config.model.parts and part not in stage.config.freeze


def _decoder_layer(language: LanguageConfig, load: TokenLoad, causal: Causal) -> Flops:
    """Grouped-query attention and SwiGLU: 2 t h d (a + 2g) + 2 t a d h + 6 t h f, and 4 a d a query-key pair."""
    tokens = load.num_tokens
    heads, hidden = language.num_attention_heads, language.hidden_size
    groups, channels = language.num_query_groups or heads, language.kv_channels or hidden // heads
    qkv = 2 * tokens * hidden * channels * (heads + 2 * groups)
    output = 2 * tokens * heads * channels * hidden
    mlp = 3 * 2 * tokens * hidden * language.ffn_hidden_size
    attention = 4 * load.num_pairs * heads * channels
    return Flops(qkv + output + mlp, attention // 2 if causal == "half" else attention)


def _patch_embedding(vision: VisionConfig) -> int:
    """One image: a product [patches, 3 p^2] x [3 p^2, h]."""
    return 2 * _patches(vision) * 3 * vision.patch_size**2 * vision.hidden_size


def _vision_layers(vision: VisionConfig, num_images: int, num_layers: int) -> Flops:
    """Layers of full attention over patches and class token: 8 t h^2 + 4 t h f, and 4 t^2 h of attention, an image."""
    tokens, hidden = _features(vision), vision.hidden_size
    weights = 8 * tokens * hidden**2 + 4 * tokens * hidden * (vision.ffn_hidden_size or 4 * hidden)
    count = num_images * num_layers
    return Flops(count * weights, count * 4 * tokens**2 * hidden)


def _qformer(qformer: QFormerConfig, vision: VisionConfig, num_images: int) -> tuple[Flops, Flops]:
    """q queries, all layers: 8 q h^2 + 4 q h f, and 4 q^2 h of attention; those that look at t features: 4 t d h for their
    keys and values, 4 q h^2, and 4 q t h of attention. First the keys and values, then the rest."""
    queries, hidden = qformer.num_query_tokens, qformer.hidden_size
    features, ffn = _features(vision), qformer.ffn_hidden_size or 4 * hidden
    num_layers, num_looking = qformer.num_layers, -(-qformer.num_layers // qformer.cross_attention_frequency)
    keys_and_values = num_looking * 4 * features * vision.hidden_size * hidden
    weights = num_layers * queries * hidden * (8 * hidden + 4 * ffn) + num_looking * 4 * queries * hidden**2
    attention = 4 * queries * hidden * (num_layers * queries + num_looking * features)
    return Flops(num_images * keys_and_values), Flops(num_images * weights, num_images * attention)


def _features(vision: VisionConfig) -> int:
    """What the layers see of an image: patches, and a class token in all but SigLIP."""
    return _patches(vision) + (vision.tower != "siglip")


def _patches(vision: VisionConfig) -> int:
    return (vision.image_size // vision.patch_size) ** 2
