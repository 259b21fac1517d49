"""What a dry run found: dataclasses of plain numbers. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products and convolutions; a product [m, k] x [k, n] is 2mkn of them, causal attention counts in full."""

    forward: int = 0
    backward: int = 0
    recomputed: int = 0
    """Forward passes that run again in the backward pass, attention's own scores among them: not part of ``model``."""
    causal: int = 0
    """What of ``model`` are products of causal attention."""

    @property
    def model(self) -> int:
        """Forward and backward, with causal attention in full."""
        return self.forward + self.backward

    @property
    def model_half(self) -> int:
        """The same where half of a causal score matrix counts."""
        return self.model - self.causal // 2

    def __add__(self, other: Work) -> Work:
        return self.plus(other, 1)

    def plus(self, other: Work, times: int) -> Work:
        """This and so many of the other."""
        return Work(
            self.forward + times * other.forward,
            self.backward + times * other.backward,
            self.recomputed + times * other.recomputed,
            self.causal + times * other.causal,
        )


@dataclass(frozen=True)
class Traffic:
    """One kind of communication of a rank within one group."""

    group: str
    """tp, pp, dp, cp, mp and others of ``mcore.groups.name_of``; relay (choices of visual tokens, down the
    pipeline through host memory), world."""
    kind: str
    """all_reduce, all_gather, reduce_scatter, broadcast, send, recv."""
    group_size: int
    """Ranks."""
    count: int
    bytes: int
    """Of the whole tensors: what is reduced, what a gather gives, what is scattered, sent or received. On a ring a rank sends
    (n - 1) / n of it for a gather or a scatter, twice that for an all-reduce."""


@dataclass(frozen=True)
class Memory:
    """Bytes that the rank holds."""

    weights_bytes: int
    gradients_bytes: int
    """Buffers that gradients are summed in, without padding."""
    optimizer_bytes: int
    """Moments and master weights of this rank's share."""
    padding_bytes: int
    """What weight and gradient buffers are larger than their content."""
    fp8_weights_bytes: int
    """Copies of weights in FP8 (kernels=engine)."""
    activations_bytes: int
    """Largest sum of the tensors that backward passes wait for; what persists (weights) does not count."""
    activations_by_module: dict[str, int] = field(default_factory=dict)
    """The same at that moment, by the module that saved them first."""
    peak_bytes: int = 0
    """Largest sum of all tensors at any moment of the step."""
    activations_at_peak_bytes: int = 0

    @property
    def persistent_bytes(self) -> int:
        """What lives through the stage."""
        return (
            self.weights_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.padding_bytes
            + self.fp8_weights_bytes
        )


@dataclass(frozen=True)
class Account:
    """One training step of one rank, counted from the operations that it executed."""

    rank: int
    world_size: int
    tp_rank: int
    cp_rank: int
    pp_rank: int
    dp_rank: int
    stage: str
    kernels: str
    """Whose layers were counted: torch, engine."""
    step: int
    num_microbatches: int
    num_executed: int
    """Micro-batches that were run; the rest does what they do."""
    sequence_length: int
    """Tokens of a row."""
    layer_runs: dict[int, int]
    """In how many micro-batches each decoder layer of this rank ran."""
    parameters: int
    trained_parameters: int
    work: dict[str, Work]
    """By module, as ``language.decoder.layers.mlp.linear_fc1``: layers are summed. ``vtc`` is what chooses or averages visual tokens."""
    traffic: tuple[Traffic, ...]
    memory: Memory
    max_passes_in_flight: int
    """Forward passes of this rank's chunks that wait for their backward passes; with one chunk a rank, micro-batches in flight."""
    notes: tuple[str, ...]
    """In what the cluster would do otherwise."""
    seconds: float
    """Processor time that the dry run itself took."""

    @property
    def total_work(self) -> Work:
        """Of all modules."""
        return sum(self.work.values(), Work())

    def work_of(self, *prefixes: str) -> Work:
        """Of the modules whose names begin so."""
        return sum((work for name, work in self.work.items() if name.startswith(prefixes)), Work())

    def bytes_of(self, group: str, *kinds: str) -> int:
        """Communicated in ``group``, by these kinds (none: all)."""
        return sum(one.bytes for one in self.traffic if one.group == group and (not kinds or one.kind in kinds))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        from dataclasses import asdict

        total = self.total_work
        derived = {
            "model_flops": total.model,
            "model_flops_causal_half": total.model_half,
            "persistent_bytes": self.memory.persistent_bytes,
        }
        return {**asdict(self), **derived}
