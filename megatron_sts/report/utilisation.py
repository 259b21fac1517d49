"""How much of a stage each decoder layer and each pipeline rank executed, planned and real. Knows no page and no figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sts.report.run import Run


@dataclass(frozen=True)
class Utilisation:
    """Executed shares of a stage's micro-batches, over the steps that have a line."""

    planned: Sequence[float]
    """Of each decoder layer, from the probabilities of the whole stage."""
    executed: Sequence[float]
    """Of each decoder layer, as counted while training."""
    owner: Sequence[int]
    """Pipeline rank of each layer."""
    num_ranks: int
    """Pipeline ranks; the last may own no layer."""

    def by_rank(self, shares: Sequence[float]) -> list[float]:
        """Mean over the layers of each pipeline rank; 0 for one without layers."""
        found: list[list[float]] = [[] for _ in range(self.num_ranks)]
        for rank, share in zip(self.owner, shares, strict=True):
            found[rank].append(share)
        return [sum(of_rank) / len(of_rank) if of_rank else 0.0 for of_rank in found]


def utilisation(run: Run) -> dict[str, Utilisation]:
    """By stage, for those with LDS that have run."""
    found, num_ranks = {}, run.config["parallel"]["pipeline_model_parallel_size"]
    for stage, plan in run.skipping.items():
        if lines := run.steps.get(stage):
            shares = ([count / line["num_microbatches"] for count in line["layer_runs"]] for line in lines)
            executed = [sum(of_layer) / len(lines) for of_layer in zip(*shares, strict=True)]
            found[stage] = Utilisation(plan["executed_planned"], executed, plan["layer_owner"], num_ranks)
    return found
