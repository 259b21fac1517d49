"""A tower that is spread, in a dry run: it encodes the images of the whole step, however few of its micro-batches are run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from megatron_sts.data.batch import Batch
from megatron_sts.model.spread import SpreadTower


class PlannedTower(SpreadTower):
    """Stands for a stage's ``SpreadTower``, which does the work.

    How many images a rank encodes does not grow evenly with the micro-batches, so that nothing could be extended from few of them.
    """

    def __init__(
        self, tower: SpreadTower, num_microbatches: int, persist: Callable[[Sequence[torch.Tensor]], None]
    ) -> None:
        """``persist`` is told of the features, which live through the passes whether or not autograd saves them."""
        self._spread, self._num_microbatches, self._persist = tower, num_microbatches, persist

    def encode(self, batches: Sequence[Batch]) -> list[Batch]:
        """As the tower does, of the first micro-batches of so many that are all alike."""
        whole = [replace(batches[0], number=number) for number in range(self._num_microbatches)]
        encoded = self._spread.encode(whole)
        self._persist([batch.features for batch in encoded if batch.features is not None])
        return encoded[: len(batches)]
