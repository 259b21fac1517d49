"""What a layout costs in expectation, many layouts at once: the quick model of the planner's search."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.cost.flops import planned_load, step_work, work_besides_layers
from megatron_sts.lds.schedule import skip_probabilities

EVENNESS = 0.02
"""Weight of the chunks' spread beside the slowest rank: chunks of one size make ranks wait least for each other."""
BISECTIONS = 16
"""2^-16 of a layer is far below what a moved layer changes."""


@dataclass(frozen=True)
class ExpectedWork:
    """One stage. Layer units; the rows are steps of a grid, each standing for as many FLOPs as ``weight`` says."""

    keep: NDArray[np.float64]
    """1 - p_l, [steps, layers]."""
    first: float
    """Fixed work of the first rank."""
    last: float
    equal: bool
    """Whether the sampler makes all ranks expect equal work, as far as their layers allow (quota)."""
    weight: float

    def cost(self, counts: NDArray[np.int_], pp: int) -> NDArray[np.float64]:
        """The slowest rank's work over the stage, and a little for chunks of unequal work; ``counts`` [layouts, chunks]."""
        work = self._of_chunks_with_fixed(counts)
        return np.asarray((self.slowest(counts, pp) + EVENNESS * work.std(axis=-1)).mean(axis=1) * self.weight)

    def slowest(self, counts: NDArray[np.int_], pp: int) -> NDArray[np.float64]:
        """The slowest rank's expected work, in layers, [layouts, steps]."""
        work = self._of_chunks_with_fixed(counts)
        ranks = work.reshape(*work.shape[:2], -1, pp).sum(axis=2)
        return self._equalised(ranks, counts, pp) if self.equal else np.asarray(ranks.max(axis=-1))

    def _of_chunks_with_fixed(self, counts: NDArray[np.int_]) -> NDArray[np.float64]:
        work = self._of_chunks(self.keep, counts)
        work[..., 0] += self.first
        work[..., -1] += self.last
        return work

    def _of_chunks(self, of_layers: NDArray[np.float64], counts: NDArray[np.int_]) -> NDArray[np.float64]:
        """Sums over each chunk's layers, [layouts, steps, chunks]."""
        ends = np.cumsum(counts, axis=1)
        sums = np.pad(np.cumsum(of_layers, axis=1), [(0, 0), (1, 0)])
        return np.moveaxis(sums[:, ends] - sums[:, ends - counts], 0, 1)

    def _equalised(self, ranks: NDArray[np.float64], counts: NDArray[np.int_], pp: int) -> NDArray[np.float64]:
        """The slowest rank when probabilities are scaled to a common level of work, [layouts, steps].

        A rank has as much to skip as layers with p > 0 (``quota.equal_work_probabilities``); the sum stays what it was.
        """
        skippable = self._of_chunks((self.keep < 1).astype(np.float64), counts)
        skippable = skippable.reshape(*skippable.shape[:2], -1, pp).sum(axis=2)
        layers = counts.reshape(len(counts), 1, -1, pp).sum(axis=2)
        dense = layers + self._fixed(pp)
        skipped = (dense - ranks).sum(axis=-1)
        low, high = (dense - skippable).min(axis=-1), np.broadcast_to(dense.max(axis=-1), skipped.shape)
        for _ in range(BISECTIONS):
            level = (low + high) / 2
            enough = np.clip(dense - level[..., None], 0, skippable).sum(axis=-1) >= skipped
            low, high = np.where(enough, level, low), np.where(enough, high, level)
        return np.asarray((dense - np.clip(dense - low[..., None], 0, skippable)).max(axis=-1))

    def _fixed(self, pp: int) -> NDArray[np.float64]:
        fixed = np.zeros(pp)
        fixed[0] += self.first
        fixed[-1] += self.last
        return fixed


def expected_work(resolved: Resolved, stage: ResolvedStage, steps: list[int]) -> ExpectedWork:
    """The stage on these steps; dense ones are all alike, so that one stands for all."""
    lds, num_layers = stage.config.lds, resolved.config.model.language.num_layers
    work = step_work(resolved, stage, planned_load(resolved, stage, stage.typical))
    if lds is None:
        keep = np.ones((1, num_layers))
    else:
        keep = 1 - np.array([skip_probabilities(lds, step, stage.num_steps, num_layers) for step in steps[::8]])
    equal = lds is not None and lds.sampler == "quota"
    first, last = work_besides_layers(resolved, stage, work)
    return ExpectedWork(keep, first, last, equal, float(stage.num_steps * work.layer))
