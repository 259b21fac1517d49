"""Bytes between ranks in one training step, by group and kind, from shapes alone. Torch-free; knows no links and no seconds.

The bytes of a collective are those of the whole tensor: what is reduced or broadcast, the input of a reduce-scatter, the output of an
all-gather; what really crosses a link depends on the algorithm (a ring moves (n-1)/n of it, twice for an all-reduce). Of transfers
between stages a rank counts what it sends. Symbols as in ``cost/activations.py``.

=========== ============================================================================================================
tp          a layer: 2 e t h forward and 2 backward, all-reduced, or with sequence parallelism gathered before and
            reduce-scattered after each block (Korthikanti et al., arXiv 2205.05198), and gathered again for the weights' gradients;
            embedding, head, tower and projector likewise; three fp32 numbers a token in the loss
cp          keys and values of whole rows and their gradients; features of images
pp          e t' h a micro-batch and boundary between chunks, forward and backward
dp          fp32 gradients, all-reduced, or with the distributed optimizer reduce-scattered, and the weights gathered
vision      pixels from a copy's first rank to the others, and features to those of the first stage, if the tower is spread
embedding   the fp32 gradient of a tied word embedding, between first and last stage
mp, world   the batch without its images, the gradient norm, a step's counts and, with LDS, digests of masks
=========== ============================================================================================================

A layer that a micro-batch skips communicates nothing in its tensor-parallel group; one that a whole step skips nothing at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_sts.config.precision import PRODUCTS, Product
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.tokens import LOOKING
from megatron_sts.cost.activations import FP32_BYTES, INDEX_BYTES, Kernels, is_emulated, multiplies_in_fp8
from megatron_sts.cost.buckets import buckets, num_gradient_ranks, rank_weights
from megatron_sts.cost.flops import TokenLoad
from megatron_sts.cost.memory import GRADIENT_BYTES, learning_parts
from megatron_sts.cost.step import StepShape, microbatch_load
from megatron_sts.cost.vision import features_bytes, image_share, images_of_copy
from megatron_sts.cost.weights import head_width, num_groups

Group = Literal["tp", "cp", "tp-cp", "pp", "relay", "vision", "dp", "embedding", "mp", "world"]
"""Ranks that share layers' matrices (tp), the tokens of a row (cp), either (tp-cp), the pipeline (pp), and beside it through host memory
(relay); a step's images (vision); gradients (dp); a tied word embedding (first and last stage); one copy of the model (mp); all."""
Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "broadcast", "send"]

MASK_BLOCK_STEPS, MASK_HEADER_FIELDS, NUM_TOTALS = 64, 5, 19
"""Of ``lds/sync.py`` and ``train/step.py``: steps a digest exchange covers, its further fields, and numbers beside the layers'."""
BATCH_BYTES = 34
"""A token of ``data.batch.Batch``: three int64, an fp32, an int32 and two bool."""


@dataclass(frozen=True)
class Traffic:
    """What one rank hands to one kind of collective in a step; means over steps are not whole numbers."""

    group: Group
    kind: Kind
    what: str
    num_calls: float
    num_bytes: float


def communication(
    resolved: Resolved, stage: ResolvedStage, step: StepShape, kernels: Kernels
) -> list[tuple[Traffic, ...]]:
    """Of the first tensor- and context-parallel rank of each pipeline stage: only with a tower that is spread others have other images."""
    ranks = range(resolved.config.parallel.pipeline_model_parallel_size)
    return [tuple(_of_rank(_Run(resolved, stage, step, kernels, rank))) for rank in ranks]


@dataclass(frozen=True)
class _Run:
    """A step on a rank of one pipeline stage."""

    resolved: Resolved
    stage: ResolvedStage
    step: StepShape
    kernels: Kernels
    rank: int

    @property
    def element_bytes(self) -> int:
        return 4 if self.resolved.config.precision.params == "fp32" else 2

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_last(self) -> bool:
        return self.rank == self.resolved.config.parallel.pipeline_model_parallel_size - 1

    @property
    def learns(self) -> bool:
        """The language model."""
        return "language" in learning_parts(self.resolved, self.stage)

    @property
    def load(self) -> TokenLoad:
        """Of a micro-batch, in whole rows."""
        return microbatch_load(self.resolved, self.stage, self.step.counts)

    @property
    def cp(self) -> int:
        """Ranks that share out the tokens of a row."""
        return self.resolved.config.parallel.context_parallel_size

    @property
    def hidden_bytes(self) -> int:
        """e t h of a micro-batch, of a rank's own tokens."""
        return self.element_bytes * self.load.num_tokens * self.resolved.config.model.language.hidden_size // self.cp


def _of_rank(run: _Run) -> Iterator[Traffic]:
    parallel = run.resolved.config.parallel
    if parallel.tensor_model_parallel_size > 1:
        yield from _layers(run)
        yield from _ends(run)
        yield from _images(run)
    if run.cp > 1:
        yield from _contexts(run)
    if run.cp * parallel.tensor_model_parallel_size > 1:
        yield from _rows(run)
    if run.resolved.spreads_vision:
        yield from _spread_images(run)
    if parallel.pipeline_model_parallel_size > 1:
        yield from _boundaries(run)
        yield from _tied_embedding(run)
    if num_gradient_ranks(run.resolved) > 1:
        yield from _gradients(run)
    if run.resolved.world_size > 1:
        yield from _numbers(run)


def _layers(run: _Run) -> Iterator[Traffic]:
    """Of the decoder layers, by how often each runs; full recomputation runs the forward pass twice."""
    config, owner = run.resolved.config, run.resolved.layer_owner
    own = [layer for layer, rank in enumerate(owner) if rank == run.rank]
    passes = 2 if config.parallel.recompute == "full" else 1
    runs = sum(run.step.layer_runs[layer] for layer in own)
    if config.parallel.sequence_parallel:
        gathers, gathered = 0.0, 0.0
        for layer in own:
            for product in PRODUCTS:
                count = run.step.layer_runs[layer] * _gathers(run, layer, product, passes)
                gathers, gathered = gathers + count, gathered + count * _gathered_bytes(run, layer, product)
        yield Traffic("tp", "all_gather", "decoder layers", gathers, gathered)
        scatters = (2 * passes + 2) * runs
        yield Traffic("tp", "reduce_scatter", "decoder layers", scatters, scatters * run.hidden_bytes)
        if run.learns:
            held = rank_weights(run.resolved, run.rank)
            norms = sum(each.num_elements for each in held if each.part == "language" and not each.is_split)
            yield Traffic("tp", "all_reduce", "gradients of norms", 1, norms * GRADIENT_BYTES)
    else:
        reduces = (2 * passes + 2) * runs
        yield Traffic("tp", "all_reduce", "decoder layers", reduces, reduces * run.hidden_bytes)


def _gathers(run: _Run, layer: int, product: Product, passes: int) -> int:
    """For a product of a layer that runs once: column-split ones of their inputs, in each forward pass and, unless emulation kept
    them, for the weight's gradient; row-split ones of their outputs' gradients."""
    if product in ("proj", "fc2"):
        return 1
    return passes + (run.learns and not is_emulated(run.resolved, run.stage, layer, product))


def _gathered_bytes(run: _Run, layer: int, product: Product) -> int:
    """Of a sequence that is gathered for a product: Transformer Engine sends it in FP8 where it multiplies in FP8."""
    tokens = run.load.num_tokens // run.cp
    in_fp8 = run.kernels == "engine" and multiplies_in_fp8(run.resolved, run.stage, tokens, layer, product)
    return run.hidden_bytes // run.element_bytes if in_fp8 else run.hidden_bytes


def _ends(run: _Run) -> Iterator[Traffic]:
    """Of word embedding, head and loss."""
    count, size, config = run.stage.num_microbatches, run.hidden_bytes, run.resolved.config
    is_cut = config.parallel.sequence_parallel
    if run.is_first:
        yield Traffic("tp", "all_reduce", "embedding", count, count * size * run.cp)  # of whole rows
        if is_cut:
            yield Traffic("tp", "all_gather", "embedding", count, count * size)
    if run.is_last:
        gathers = (2 if run.learns else 1) * count
        if is_cut:
            yield Traffic("tp", "all_gather", "head", gathers, gathers * size)
            yield Traffic("tp", "reduce_scatter", "head", count, count * size)
        else:
            yield Traffic("tp", "all_reduce", "head", count, count * size)
        tokens = size // (run.element_bytes * config.model.language.hidden_size)
        # The fused loss, which runs in bf16 take, sums two of its numbers in one call.
        num_calls = 3 if run.resolved.config.precision.params == "fp32" else 2
        yield Traffic("tp", "all_reduce", "loss", num_calls * count, 3 * count * FP32_BYTES * tokens)


def _images(run: _Run) -> Iterator[Traffic]:
    """Of tower and projector."""
    model, learning = run.resolved.config.model, learning_parts(run.resolved, run.stage)
    if not run.is_first or model.vision is None:
        return
    load, count = run.load, run.stage.num_microbatches
    if model.vision.tower != "hf" and load.num_images and not run.resolved.spreads_vision:
        calls = (4 if "vision" in learning else 2) * run.resolved.num_vision_layers * count
        features = (model.vision.image_size // model.vision.patch_size) ** 2 + (model.vision.tower != "siglip")
        size = run.element_bytes * -(-load.num_images // run.cp) * features * model.vision.hidden_size
        yield Traffic("tp", "all_reduce", "vision tower", calls, calls * size)
    projected = count * run.element_bytes * load.num_projected_tokens
    if projected:
        kind: Kind = "all_gather" if model.projector.type == "linear" else "all_reduce"
        yield Traffic("tp", kind, "projector", count, projected * model.language.hidden_size)
        if {"vision", "qformer", "projector"} & set(learning):
            width = (model.qformer or model.vision).hidden_size
            yield Traffic("tp", "all_reduce", "projector's input", count, projected * width)


def _rows(run: _Run) -> Iterator[Traffic]:
    """Among ranks that work on the same rows: pixels, and the choice of samplers that look; and of those that share out their images
    the features."""
    model, load, count, vtc = run.resolved.config.model, run.load, run.stage.num_microbatches, run.stage.config.vtc
    if not run.is_first or model.vision is None or not load.num_images:
        return
    group: Group = "tp" if run.cp == 1 else "tp-cp"
    if run.resolved.first_stage_sees_pixels(run.stage):
        yield Traffic(group, "broadcast", "pixels", count, count * 3 * load.num_images * model.vision.image_size**2)
    if vtc is not None and vtc.sampler in LOOKING and load.num_visual_tokens < load.num_projected_tokens:
        yield Traffic(group, "broadcast", "chosen tokens", count, count * INDEX_BYTES * load.num_visual_tokens)
    if run.cp > 1 and (model.qformer is not None or not run.resolved.spreads_vision):
        of_image = run.stage.view_tokens * (model.qformer or model.vision).hidden_size
        size = count * run.element_bytes * of_image * -(-load.num_images // run.cp) * run.cp
        yield Traffic("cp", "all_gather", "features", count, size)
        if {"vision", "qformer"} & set(learning_parts(run.resolved, run.stage)):
            yield Traffic("cp", "reduce_scatter", "features", count, size)


def _spread_images(run: _Run) -> Iterator[Traffic]:
    """Pixels from the very first rank, features of a rank's own images to each of the first stage's."""
    parallel, vision, counts = run.resolved.config.parallel, run.resolved.config.model.vision, run.step.counts
    num_ranks, num_images = run.resolved.model_parallel_size, images_of_copy(run.resolved, run.stage, counts)
    if vision is None or not num_images:
        return
    num_receivers = parallel.tensor_model_parallel_size * run.cp
    shares = [image_share(num_images, rank, num_ranks) for rank in range(num_ranks)]
    own = shares[run.rank * num_receivers]
    if run.is_first:
        dealt = [3 * len(share) * vision.image_size**2 for share in shares[1:] if share]
        yield Traffic("vision", "send", "pixels", len(dealt), sum(dealt))
    num_sends = num_receivers - run.is_first if own else 0
    size = features_bytes(run.resolved, run.stage, counts, own)
    yield Traffic("vision", "send", "features", num_sends, num_sends * size)


def _contexts(run: _Run) -> Iterator[Traffic]:
    """Keys and values 2 e t g d / tp of whole rows, and their gradients: gathered and reduce-scattered by torch's attention; by
    Transformer Engine's they go round a ring, those of a rank forward, with their gradients backward."""
    config, owner = run.resolved.config, run.resolved.layer_owner
    language, tp = config.model.language, config.parallel.tensor_model_parallel_size
    runs = sum(run.step.layer_runs[layer] for layer, rank in enumerate(owner) if rank == run.rank)
    passes = 1 if config.parallel.recompute == "none" else 2
    size = 2 * run.element_bytes * run.load.num_tokens * num_groups(language) * head_width(language) // tp
    if run.kernels == "torch":
        yield Traffic("cp", "all_gather", "keys and values", passes * runs, passes * runs * size)
        yield Traffic("cp", "reduce_scatter", "keys and values", runs, runs * size)
    else:
        sends = (run.cp - 1) * (passes + 2) * runs
        yield Traffic("cp", "send", "keys and values", sends, sends * (size // run.cp))


def _boundaries(run: _Run) -> Iterator[Traffic]:
    """Between pipeline stages: outputs to the next chunk, their gradients to the one before, and what a sampler chose."""
    parallel, count = run.resolved.config.parallel, run.stage.num_microbatches
    shards = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    sends = count * (2 * run.step.num_units - run.is_first - run.is_last)
    yield Traffic("pp", "send", "activations and their gradients", sends, sends * (run.hidden_bytes // shards))
    vtc, load = run.stage.config.vtc, run.load
    is_moved = vtc is not None and vtc.sampler in LOOKING and vtc.positions == "original"
    if is_moved and run.is_first and load.num_visual_tokens < load.num_projected_tokens:
        sends = count * (parallel.pipeline_model_parallel_size - 1)
        yield Traffic("relay", "send", "chosen tokens", sends, sends * INDEX_BYTES * load.num_visual_tokens)


def _gradients(run: _Run) -> Iterator[Traffic]:
    """Between data-parallel ranks, bucket by bucket: a layer's only in steps that run it."""
    parallel, stage, active = run.resolved.config.parallel, run.stage, run.step.layer_active
    of_rank = buckets(run.resolved, run.rank, learning_parts(run.resolved, stage))
    shares = [1.0 if bucket.layer is None else active[bucket.layer] for bucket in of_rank]
    elements = sum(share * bucket.num_elements for share, bucket in zip(shares, of_rank, strict=True))
    kind: Kind = "reduce_scatter" if parallel.use_distributed_optimizer else "all_reduce"
    yield Traffic("dp", kind, "gradients", sum(shares), elements * GRADIENT_BYTES)
    if parallel.use_distributed_optimizer:
        lds = stage.config.lds
        if lds is not None and lds.skipped_update == "zero_grad" and not parallel.overlap_param_gather:
            shares = [1.0] * len(of_rank)  # Adam moves what has no gradient, too
        elements = sum(share * bucket.num_elements for share, bucket in zip(shares, of_rank, strict=True))
        yield Traffic("dp", "all_gather", "weights", sum(shares), elements * run.element_bytes)


def _tied_embedding(run: _Run) -> Iterator[Traffic]:
    language, tp = run.resolved.config.model.language, run.resolved.config.parallel.tensor_model_parallel_size
    if language.tie_word_embeddings and run.learns and (run.is_first or run.is_last):
        size = GRADIENT_BYTES * language.vocab_size * language.hidden_size // tp
        yield Traffic("embedding", "all_reduce", "gradient", 1, size)


def _numbers(run: _Run) -> Iterator[Traffic]:
    """Of the whole step: how many tokens count, the gradient norm, what was done, digests of masks; and the batches themselves."""
    parallel, stage = run.resolved.config.parallel, run.stage
    if parallel.pipeline_model_parallel_size > 1:
        yield Traffic("pp", "broadcast", "number of tokens", 1, FP32_BYTES)
    if num_gradient_ranks(run.resolved) > 1:
        yield Traffic("dp", "all_reduce", "number of tokens", 1, FP32_BYTES)
    is_copied = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size > 1
    if parallel.use_distributed_optimizer or is_copied:
        group: Group = "world" if parallel.use_distributed_optimizer else "mp"
        yield Traffic(group, "all_reduce", "gradient norm", 1, FP32_BYTES)
    totals = INDEX_BYTES * (NUM_TOTALS + run.resolved.config.model.language.num_layers)
    yield Traffic("world", "all_reduce", "counts", 1, totals)
    if stage.config.lds is not None:
        digests = INDEX_BYTES * (MASK_HEADER_FIELDS + MASK_BLOCK_STEPS)
        yield Traffic("world", "broadcast", "digests of masks", 1 / MASK_BLOCK_STEPS, digests / MASK_BLOCK_STEPS)
    if is_copied:
        load = run.load
        size = stage.num_microbatches * BATCH_BYTES * load.num_tokens
        yield Traffic("mp", "broadcast", "batches", 1, size)
