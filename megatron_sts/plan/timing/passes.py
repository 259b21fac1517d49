"""Seconds of a forward and a backward pass, by what they are spent on."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Spent:
    """Seconds of a GPU, by kind; kinds follow each other, so that they add up."""

    gemm: float = 0.0
    """Matrix products."""
    attention: float = 0.0
    memory: float = 0.0
    """Norms, activations, residual sums, casts, the loss."""
    tensor: float = 0.0
    """Tensor-parallel communication that nothing hides."""
    context: float = 0.0
    """Context-parallel communication that nothing hides."""

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def __mul__(self, count: float) -> Spent:
        return Spent(*(getattr(self, each.name) * count for each in fields(self)))

    @property
    def total(self) -> float:
        """All kinds."""
        return sum(getattr(self, each.name) for each in fields(self))


@dataclass(frozen=True)
class Passes:
    """What one piece of the model takes for one micro-batch."""

    forward: Spent = field(default_factory=Spent)
    backward: Spent = field(default_factory=Spent)
    forward_launch_s: float = 0.0
    """What the host takes to launch it."""
    backward_launch_s: float = 0.0

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.forward + other.forward,
            self.backward + other.backward,
            self.forward_launch_s + other.forward_launch_s,
            self.backward_launch_s + other.backward_launch_s,
        )

    def __mul__(self, count: float) -> Passes:
        return Passes(
            self.forward * count,
            self.backward * count,
            self.forward_launch_s * count,
            self.backward_launch_s * count,
        )
