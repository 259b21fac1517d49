"""Seconds of one training step: passes in the pipeline's order, then reduction, update and gather. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from megatron_sts.plan.hardware import Hardware
from megatron_sts.plan.timeline import Durations, idle_share, step_seconds
from megatron_sts.plan.timing.collectives import send_s
from megatron_sts.plan.timing.decoder import decoder_layer
from megatron_sts.plan.timing.ends import before_passes, deferred_share, first_rank, head_weight_gradient, last_rank
from megatron_sts.plan.timing.passes import Passes, Spent
from megatron_sts.plan.timing.update import DENSE, Share, Update, Windows, update
from megatron_sts.plan.timing.workload import Workload

TINY_S = 1e-12
"""Below any time here: keeps ranks without work from a division by zero."""


@dataclass(frozen=True)
class Pieces:
    """What a micro-batch takes in each piece of the model."""

    layer: Passes
    """A decoder layer, in the mean over those that multiply in FP8 and those that do not."""
    first: Passes
    last: Passes
    before: Spent = field(default_factory=Spent)
    """Of a rank, once a step: before its passes."""

    @property
    def all(self) -> tuple[Passes, Passes, Passes]:
        """Of a micro-batch, in the order of their names above."""
        return self.layer, self.first, self.last


@dataclass(frozen=True)
class Step:
    """One step, in seconds."""

    pipeline_s: float
    update: Update
    idle: float
    """Share of the pipeline's time that its ranks wait, in the mean."""
    spent: dict[str, float]
    """What a rank's GPU is at while the pipeline runs, in the mean over ranks, by kind."""

    @property
    def total_s(self) -> float:
        """From one step to the next, when data wait ready."""
        return self.pipeline_s + self.update.total_s


def pieces_of(hardware: Hardware, workload: Workload) -> Pieces:
    """Times of the model's pieces for one micro-batch."""
    num_layers = workload.model.language.num_layers
    layer = decoder_layer(hardware, workload, workload.fp8_products)
    if workload.fp8 is not None and workload.num_bf16_layers:
        share = workload.num_bf16_layers / num_layers
        layer = layer * (1 - share) + decoder_layer(hardware, workload, frozenset()) * share
    return Pieces(
        layer, first_rank(hardware, workload), last_rank(hardware, workload), before_passes(hardware, workload)
    )


def durations(hardware: Hardware, workload: Workload, pieces: Pieces, layers: NDArray[np.float64]) -> Durations:
    """Of passes in which ``layers`` decoder layers run, [..., rows, vpp, pp]; the ends are in the first and the last chunk.

    A host launches ahead of its GPU. Where it cannot keep up with all passes of a micro-batch, all of them are stretched. Hosts are
    taken to differ as much as GPUs do.
    """
    stretch = np.maximum(launch_ratio(pieces, layers), 1)[..., None, None, :] * slowest_of(hardware, workload.num_ranks)
    forward = _placed(layers, *(piece.forward.total for piece in pieces.all)) * stretch
    backward = _placed(layers, *(piece.backward.total for piece in pieces.all)) * stretch
    stream = 2 * workload.tokens * workload.model.language.hidden_size
    message = stream / (workload.tensor_parallel_size if workload.sequence_parallel else 1)
    send = send_s(hardware, workload.groups.pipeline, message)
    return Durations(forward, backward, send, not workload.overlap_p2p_comm)


def deferred_s(hardware: Hardware, workload: Workload, run: Durations) -> float:
    """What shows of head gradients that were put off: its rank has nothing else to do while the others' last passes follow."""
    waits = (workload.pipeline_parallel_size - 1) * float(run.backward[..., 0, 0].mean())
    later = head_weight_gradient(hardware, workload).total * deferred_share(workload) * workload.num_microbatches
    return max(later - waits, 0.0)


def launch_ratio(pieces: Pieces, layers: NDArray[np.float64]) -> NDArray[np.float64]:
    """What a rank's host takes for all passes of a micro-batch over what its GPU takes, [..., pp]: above 1 the host decides."""
    computes, launches = (
        sum_of_passes.mean(axis=-3).sum(axis=-2)
        for sum_of_passes in (
            _placed(layers, *(piece.forward.total + piece.backward.total for piece in pieces.all)),
            _placed(layers, *(piece.forward_launch_s + piece.backward_launch_s for piece in pieces.all)),
        )
    )
    return np.asarray(launches / np.maximum(computes, TINY_S))


def slowest_of(hardware: Hardware, num_ranks: int) -> float:
    """How much longer the slowest of so many equal GPUs takes than one in the mean: the expected largest of normal deviations
    (Blom's approximation)."""
    if num_ranks == 1:
        return 1.0
    return 1 + hardware.device.speed_spread * NormalDist().inv_cdf((num_ranks - 0.375) / (num_ranks + 0.25))


def step_of(hardware: Hardware, workload: Workload, share: Share = DENSE) -> Step:
    """A step that skips nothing."""
    pieces = pieces_of(hardware, workload)
    layers = np.array(workload.layout, dtype=np.float64)[None]
    run, num = durations(hardware, workload, pieces, layers), workload.num_microbatches
    return Step(
        float(step_seconds(run, num)) + deferred_s(hardware, workload, run) + lead_s(pieces),
        update(hardware, workload, windows(run), share),
        float(idle_share(run, num)),
        spent(workload, pieces, float(layers.sum())),
    )


def lead_s(pieces: Pieces) -> float:
    """What comes before the first pass of a step, and what a GPU then waits, when its host has no lead yet: for many small kernels."""
    return pieces.before.total + max(pieces.first.forward_launch_s - pieces.first.forward.total, 0.0)


def windows(run: Durations) -> Windows:
    """Of the rank that has the shortest: behind less than that no rank can hide its communication."""
    num_chunks, num_ranks = run.forward.shape[-2:]
    num = num_ranks if num_chunks > 1 else 1
    forward, backward = (part.mean(axis=-3).sum(axis=-2).min(axis=-1).mean() for part in (run.forward, run.backward))
    return Windows(num * float(forward), num * float(backward))


def spent(workload: Workload, pieces: Pieces, layers: float) -> dict[str, float]:
    """Of a step in which ``layers`` decoder layers run for each micro-batch, a rank in the mean."""
    all_of_it = pieces.layer * layers + pieces.first + pieces.last
    each = (all_of_it.forward + all_of_it.backward) * (workload.num_microbatches / workload.pipeline_parallel_size)
    each += pieces.before
    return {kind.name: getattr(each, kind.name) for kind in fields(Spent)}


def _placed(layers: NDArray[np.float64], each: float, first: float, last: float) -> NDArray[np.float64]:
    placed = layers * each
    placed[..., 0, 0] += first
    placed[..., -1, -1] += last
    return placed
