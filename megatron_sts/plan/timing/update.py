"""What ends a step: gradients are reduced over copies of the model, weights updated and gathered. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sts.config.precision import PRODUCTS
from megatron_sts.plan.hardware import Hardware
from megatron_sts.plan.timing.collectives import all_reduce_s, gather_s
from megatron_sts.plan.timing.decoder import widths
from megatron_sts.plan.timing.kernels import memory_s
from megatron_sts.plan.timing.workload import Workload

ADAM_BYTES = 26
"""Moved for each parameter that is updated, besides its gradient: master weight and two moments are read, they and a bf16 weight written."""
FP8_WEIGHT_BYTES = 8
"""For each FP8 weight, once a step: read for its scale, read, written twice (as it is and transposed)."""
FP8_TRANSPOSE_BYTES = 2
"""The same for a weight that was gathered in FP8: only transposed."""
WEIGHT_BYTES = 2


@dataclass(frozen=True)
class Update:
    """Seconds of one step, on the rank where each takes longest."""

    reduce_s: float
    """Reducing gradients, as far as it shows."""
    gather_s: float
    """Gathering weights, as far as it shows."""
    optimizer_s: float

    @property
    def total_s(self) -> float:
        """All of it."""
        return self.reduce_s + self.gather_s + self.optimizer_s


@dataclass(frozen=True)
class Windows:
    """What overlapped communication may hide behind: the first or the last micro-batches' passes through all chunks of a rank, in
    seconds: one micro-batch, or, interleaved, as many as there are ranks, since these go through a chunk before the next one's turn."""

    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class Share:
    """Of what a dense step has, what a step that skips layers has left."""

    reduced: float = 1.0
    gathered: float = 1.0
    updated: float = 1.0


DENSE = Share()


def update(hardware: Hardware, workload: Workload, windows: Windows, share: Share = DENSE) -> Update:
    """The end of a step, of the slowest pipeline rank in each part."""
    held = trained_parameters(workload)
    copies = workload.groups.data
    shards = copies.size if workload.distributed_optimizer else 1
    layer = _layer_parameters(workload) if workload.trains("language") else 0
    reduced, gathered, optimizer = [], [], []
    for rank, (parameters, num_layers) in enumerate(zip(held, _layers_a_rank(workload), strict=True)):
        gradients = workload.assumptions.gradient_bytes * parameters * share.reduced
        weights = (WEIGHT_BYTES * parameters - layer * num_layers * workload.fp8_weights) * share.gathered
        collective = gather_s if workload.distributed_optimizer else all_reduce_s
        last = min((layer + _table(workload) * (rank == 0)) / parameters, 1) if parameters else 0
        whole = collective(hardware, copies, gradients)
        reduced.append(_exposed(workload, whole, windows.backward_s, last, workload.overlap_grad_reduce))
        whole = gather_s(hardware, copies, weights) if workload.distributed_optimizer else 0.0
        gathered.append(_exposed(workload, whole, windows.forward_s, last, workload.overlap_param_gather))
        moved = [
            (ADAM_BYTES + workload.assumptions.gradient_bytes) * parameters / shards * share.updated,
            2 * workload.assumptions.gradient_bytes * parameters,  # read for their norm, and set to zero
            fp8_cast_bytes(workload) * num_layers,
        ]
        optimizer.append(memory_s(hardware.device, moved))
    return Update(max(reduced), max(gathered), max(optimizer) + hardware.host.step_ms * 1e-3)


def trained_parameters(workload: Workload) -> list[float]:
    """Of one tensor-parallel rank of each pipeline rank. Norms of the ends and biases are left out: they are small."""
    table = _table(workload)
    layer = _layer_parameters(workload) * workload.trains("language")
    held = [layer * num_layers for num_layers in _layers_a_rank(workload)]
    held[0] += table + _before_decoder(workload)
    held[-1] += table if not workload.model.language.tie_word_embeddings or len(held) > 1 else 0
    return held


def _exposed(workload: Workload, seconds: float, window_s: float, last: float, is_overlapped: bool) -> float:
    """What shows of a collective in buckets: the bucket that comes last (a gather's: first), what the window cannot hold, and
    what the others take from the products beside them."""
    if not is_overlapped:
        return seconds
    beside = seconds * (1 - last)
    hidden = min(beside, window_s)
    return seconds * last + beside - hidden + workload.assumptions.overlap_interference * hidden


def _table(workload: Workload) -> float:
    """The embedding, whose gradient is there last and which is needed first."""
    language = workload.model.language
    return language.vocab_size * language.hidden_size / workload.tensor_parallel_size * workload.trains("language")


def _layer_parameters(workload: Workload) -> float:
    return sum(inner * columns for inner, columns in widths(workload).matrices)


def fp8_cast_bytes(workload: Workload) -> float:
    """What casting a decoder layer's weights moves in a step."""
    matrices = zip(PRODUCTS, widths(workload).matrices, strict=True)
    in_fp8 = sum(inner * columns for product, (inner, columns) in matrices if product in workload.fp8_products)
    return (FP8_TRANSPOSE_BYTES if workload.fp8_weights else FP8_WEIGHT_BYTES) * in_fp8


def _layers_a_rank(workload: Workload) -> list[int]:
    return [sum(chunks) for chunks in zip(*workload.layout, strict=True)]


def _before_decoder(workload: Workload) -> float:
    """Tower and projector, as far as they learn."""
    model, tp = workload.model, workload.tensor_parallel_size
    vision, hidden = model.vision, model.language.hidden_size
    if vision is None:
        return 0.0
    ffn = vision.ffn_hidden_size or 4 * vision.hidden_size
    layer = vision.hidden_size * (4 * vision.hidden_size + 2 * ffn)
    tower = workload.num_vision_layers * layer / (1 if vision.tower == "hf" else tp)
    features = (model.qformer or vision).hidden_size
    projector = (features * hidden + hidden**2 * (model.projector.type == "mlp2x_gelu")) / tp
    return tower * workload.trains("vision") + projector * workload.trains("projector")
