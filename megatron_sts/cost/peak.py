"""The most memory that a rank of each pipeline stage needs at any moment of a step. Torch-free.

State (``cost/memory.py``) plus, at the worst moment of the rank's passes, what autograd keeps (``cost/activations.py``) of all
micro-batches in flight and what the pass then running needs besides. 1F1B keeps pp - r micro-batches on rank r, interleaving
2 (pp - r - 1) + (v - 1) pp + 1 chunks (Narayanan et al., arXiv 2104.04473). Outputs are freed once sent
(``deallocate_pipeline_outputs``). The allocator's fragmentation is not modelled.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.tokens import TokenCounts
from megatron_sts.cost.activations import Kernels, Saved, multiplies_in_fp8, saved
from megatron_sts.cost.memory import RankMemory, learning_parts, memory_per_rank
from megatron_sts.cost.pass_order import grouped, pass_order
from megatron_sts.cost.step import longest, microbatch_load
from megatron_sts.cost.vision import features_bytes
from megatron_sts.cost.weights import decoder_layer, embedding, products

CONTEXT_BYTES = 2 * 2**30
"""CUDA context, kernels and NCCL's buffers, outside of torch's allocator. An assumption: it was not measured."""
FP8_BYTES = 2
"""Transformer Engine keeps each weight in FP8 twice, by rows and by columns."""


@dataclass(frozen=True)
class PeakMemory:
    """Bytes on a rank of one pipeline stage at the worst moment of a step."""

    state: RankMemory
    activations_bytes: int
    """The most that autograd keeps at any moment, a recomputed layer's tensors included."""
    running_bytes: int
    """What the worst moment has above that: logits beside their fp32 copies, a weight's gradient before it is added up."""
    fp8_bytes: int
    """Copies of weights in FP8, beyond the bytes of weights that they replace (``fp8_params``)."""
    features_bytes: int
    """Of all images of a step, on the first stage, where a tower that is spread encodes them before the first pass."""
    buffers_bytes: int
    """The gathered sequence under sequence parallelism, which megatron-core keeps a buffer for."""
    num_in_flight: int
    """Most passes through chunks whose backward pass is still to come."""

    @property
    def allocated_bytes(self) -> int:
        """What torch's allocator counts (``torch.cuda.max_memory_allocated``)."""
        others = self.activations_bytes + self.running_bytes + self.fp8_bytes + self.features_bytes + self.buffers_bytes
        return self.state.total_bytes + others

    @property
    def total_bytes(self) -> int:
        """Of the device, ``CONTEXT_BYTES`` included."""
        return self.allocated_bytes + CONTEXT_BYTES


def peak_memory(
    resolved: Resolved,
    stage: ResolvedStage,
    kernels: Kernels,
    *,
    counts: TokenCounts | None = None,
    skipped: Sequence[Collection[int]] = ((),),
) -> list[PeakMemory]:
    """The peak on a rank of each pipeline stage.

    Args:
        resolved: the run.
        stage: which stage; its freeze list applies.
        kernels: whose layers the decoder has.
        counts: the shape of rows; None: the longest that the stage has.
        skipped: decoder layers (0-based) that each micro-batch skips; one entry for all of them. A stage's peak is that of a step that
            skips nothing, which may come at any time: dropping layers or rounds lowers the need of a step, not of the run.
    """
    counts = counts or longest(stage)
    of_microbatch, states = saved(resolved, stage, counts, kernels), memory_per_rank(resolved, stage)
    idle = set.intersection(*map(set, skipped))
    found = []
    for rank, state in enumerate(states):
        rows = [_units(resolved, stage, rank, of_microbatch, row, idle) for row in skipped]
        moments, num_in_flight = _moments(resolved, stage, rank, rows)
        most, worst = (max(moments, key=lambda each: each.kept), max(moments, key=lambda each: each.total))
        found.append(
            PeakMemory(
                state=state,
                activations_bytes=most.kept,
                running_bytes=worst.total - most.kept,
                fp8_bytes=fp8_bytes(resolved, stage, rank, kernels, counts),
                features_bytes=features_bytes(resolved, stage, counts) if resolved.spreads_vision and rank == 0 else 0,
                buffers_bytes=_gathered(resolved, stage, counts),
                num_in_flight=num_in_flight,
            )
        )
    return found


@dataclass(frozen=True)
class _Unit:
    """Bytes of one micro-batch in what the schedule runs as one chunk."""

    kept: int
    before: int
    """Of these, what embedding and tower keep: all that is left when their backward pass runs."""
    after: int
    """Of these, what head and loss keep: free when the layers' backward passes run."""
    recomputed: int
    arguments: int
    logits: int
    layer_gradient: int
    embedding_gradient: int


@dataclass(frozen=True)
class _Moment:
    kept: int
    running: int

    @property
    def total(self) -> int:
        return self.kept + self.running


def _units(
    resolved: Resolved,
    stage: ResolvedStage,
    rank: int,
    of_microbatch: Saved,
    skipped: Collection[int],
    idle: Collection[int],
) -> list[_Unit]:
    """Those of a pipeline rank, in the order of its chunks, for micro-batches that skip these layers in a step without ``idle``."""
    layout, (of_layer, of_embedding) = resolved.layers_per_chunk, _weight_gradients(resolved, stage)
    starts = list(accumulate(map(sum, layout), initial=0))
    busy = [number for number, (start, end) in enumerate(pairwise(starts)) if not set(range(start, end)) <= set(idle)]
    units = []
    for rounds in grouped(len(layout), busy):
        firsts = {number: starts[number] + sum(layout[number][:rank]) for number in rounds}
        layers = [first + i for number, first in firsts.items() for i in range(layout[number][rank])]
        running = [layer for layer in layers if layer not in skipped]
        is_first, is_last = rank == 0 and 0 in rounds, rank == len(layout[0]) - 1 and len(layout) - 1 in rounds
        before, after = of_microbatch.before * is_first, of_microbatch.after * is_last
        whole_input = of_microbatch.whole_input * (is_first and bool(running))
        units.append(
            _Unit(
                kept=sum(of_microbatch.layers[layer] for layer in running) + before + after + whole_input,
                before=before,
                after=after,
                recomputed=of_microbatch.recomputed * bool(running),
                arguments=of_microbatch.arguments,
                logits=of_microbatch.logits * is_last,
                layer_gradient=of_layer * bool(running),
                embedding_gradient=of_embedding * is_first,
            )
        )
    return units


def _weight_gradients(resolved: Resolved, stage: ResolvedStage) -> tuple[int, int]:
    """Of the largest matrix of a layer, and of the word embedding, as autograd hands them over."""
    config = resolved.config
    if "language" not in learning_parts(resolved, stage):
        return 0, 0
    size, tp = 4 if config.precision.params == "fp32" else 2, config.parallel.tensor_model_parallel_size
    pieces = decoder_layer(config.model.language), embedding(config.model.language)
    largest = [size * max(weight.on_rank(tp) for weight in weights) for weights in pieces]
    return largest[0], largest[1]


def _moments(
    resolved: Resolved, stage: ResolvedStage, rank: int, rows: Sequence[Sequence[_Unit]]
) -> tuple[list[_Moment], int]:
    """Those of a rank's passes that may be the worst, and the most passes in flight. Of equal micro-batches the first 4 pp
    show it."""
    pp = resolved.config.parallel.pipeline_model_parallel_size
    num_microbatches = stage.num_microbatches if len(rows) > 1 else min(stage.num_microbatches, 4 * pp)
    kept, arguments, in_flight, most, moments = 0, 0, 0, 0, []
    for each in pass_order(rank, pp, len(rows[0]), num_microbatches):
        unit = rows[each.microbatch % len(rows)][each.chunk]
        if each.is_forward:
            kept, arguments, in_flight = kept + unit.kept, arguments + unit.arguments, in_flight + 1
            moments.append(_Moment(kept, arguments + unit.logits))
        else:
            layers = _Moment(kept - unit.after + unit.recomputed, arguments + unit.layer_gradient)
            kept, arguments, in_flight = kept - unit.kept, arguments - unit.arguments, in_flight - 1
            moments += [layers, _Moment(kept + unit.before, arguments + unit.embedding_gradient)]
        most = max(most, in_flight)
    return moments, most


def fp8_bytes(resolved: Resolved, stage: ResolvedStage, rank: int, kernels: Kernels, counts: TokenCounts) -> int:
    """Transformer Engine's copies of the decoder's matrices in FP8, kept from one micro-batch to the next."""
    if kernels != "engine":
        return 0
    config, matrices = resolved.config, products(resolved.config.model.language)
    tokens = microbatch_load(resolved, stage, counts).num_tokens // config.parallel.context_parallel_size
    elements = sum(
        weight.on_rank(config.parallel.tensor_model_parallel_size)
        for layer, owner in enumerate(resolved.layer_owner)
        for product, weight in matrices.items()
        if owner == rank and multiplies_in_fp8(resolved, stage, tokens, layer, product)
    )
    replaced = 2 if config.precision.fp8_params else 0
    return elements * (FP8_BYTES - replaced)


def _gathered(resolved: Resolved, stage: ResolvedStage, counts: TokenCounts) -> int:
    """The buffer e t h into which inputs of column-split matrices are gathered under sequence parallelism."""
    config = resolved.config
    if not config.parallel.sequence_parallel:
        return 0
    size = 4 if config.precision.params == "fp32" else 2
    tokens = microbatch_load(resolved, stage, counts).num_tokens // config.parallel.context_parallel_size
    return size * tokens * config.model.language.hidden_size
