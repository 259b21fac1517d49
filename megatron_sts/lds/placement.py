"""Where the decoder layers run, and what each pipeline rank computes besides them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

from megatron_sts.config.resolve import Layout, Resolved, ResolvedStage
from megatron_sts.cost.flops import planned_load, step_work, work_besides_layers


@dataclass(frozen=True)
class Placement:
    """How a stage's work lies on the pipeline ranks."""

    owner: tuple[int, ...]
    """Pipeline rank of each 0-based decoder layer."""
    round: tuple[int, ...]
    """Number of its rank's chunk that each layer is in: an interleaved schedule runs chunk v of every rank in turn."""
    fixed_work: tuple[float, ...]
    """What each pipeline rank computes in every step besides decoder layers, in units of one layer's FLOPs."""
    head_work: float
    """The head in the same units, for rows as long as they are written: no parallel setting changes it."""

    @property
    def num_layers(self) -> int:
        return len(self.owner)

    @property
    def num_rounds(self) -> int:
        return max(self.round) + 1

    @property
    def num_ranks(self) -> int:
        return len(self.fixed_work)

    def under(self, layout: Layout) -> Placement:
        """The same stage's under another layout of the same pipeline ranks."""
        owner, rounds = _places(layout)
        return replace(self, owner=owner, round=rounds)


def placed(layout: Layout, head_work: float) -> Placement:
    """Nothing but a decoder, and a head of so many layers' FLOPs on the last rank."""
    fixed = [0.0] * (len(layout[0]) - 1) + [head_work]
    return Placement(*_places(layout), tuple(fixed), head_work)


def placement(resolved: Resolved, stage: ResolvedStage) -> Placement:
    """The run's layout with a full batch of the stage's typical shape: vision tower and projector on the first rank, head on the last."""
    work = step_work(resolved, stage, planned_load(resolved, stage, stage.typical))
    fixed = [0.0] * resolved.config.parallel.pipeline_model_parallel_size
    first, last = work_besides_layers(resolved, stage, work)
    fixed[0] += first
    fixed[-1] += last
    rounds = [[number] * sum(counts) for number, counts in enumerate(resolved.layers_per_chunk)]
    return Placement(
        resolved.layer_owner, tuple(chain.from_iterable(rounds)), tuple(fixed), _head_work(resolved, stage)
    )


def _places(layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Rank and round of each layer."""
    chunks = [
        (rank, number)
        for number, counts in enumerate(layout)
        for rank, count in enumerate(counts)
        for _ in range(count)
    ]
    owner, rounds = zip(*chunks, strict=True)
    return owner, rounds


def _head_work(resolved: Resolved, stage: ResolvedStage) -> float:
    """Without the padding that sequence and context parallelism ask for: near a half it would decide how many layers yield,
    and ``lds.rounds: N`` draws the same masks on every layout."""
    written = stage.uncompressed.model_copy(update={"sequence_length": stage.config.batch.sequence_length})
    unpadded = stage.model_copy(update={"token_multiple": 1, "uncompressed": written})
    work = step_work(resolved, unpadded, planned_load(resolved, unpadded, unpadded.typical))
    return work.after / work.layer
