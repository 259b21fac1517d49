"""Images to the ranks of a model copy, and what these made of them to its first stage. Knows no tower.

Point to point, so that a rank sends and receives what it must and no more; each waits at most for the group's timeout.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist

from megatron_sts.cost.vision import image_share
from megatron_sts.mcore.groups import place, vision_group


class CopyExchange:
    """Between the ranks of this one's copy of the model, which are numbered as in ``groups.vision_group``: the first stage's first."""

    def __init__(self) -> None:
        here, self._group = place(), vision_group()
        self._ranks: list[int] = dist.get_process_group_ranks(self._group)
        self._num_receivers = here.tp_size * here.cp_size
        self.rank = self._ranks.index(dist.get_rank())
        """This rank's number."""

    @property
    def num_ranks(self) -> int:
        """Of the copy."""
        return len(self._ranks)

    @property
    def receives(self) -> bool:
        """Whether this rank is of the first stage, which works on what all have made."""
        return self.rank < self._num_receivers

    def share(self, num_images: int, rank: int | None = None) -> range:
        """Which of a step's images a rank (None: this one) encodes: as many as others or one more."""
        return image_share(num_images, self.rank if rank is None else rank, self.num_ranks)

    def deal(self, shares: Sequence[torch.Tensor] | None, own: torch.Tensor) -> torch.Tensor:
        """Each rank's part of what the first one has; ``shares``: all of them, there, and ``own`` takes this one's. A collective."""
        if shares is None:
            self._run([dist.P2POp(dist.irecv, own, self._ranks[0], self._group)])
            return own
        self._run(dist.P2POp(dist.isend, part, self._ranks[to], self._group) for to, part in enumerate(shares) if to)
        return shares[0]

    def collect(self, own: torch.Tensor, whole: torch.Tensor | None, starts: Sequence[int]) -> None:
        """Fills ``whole`` with all ranks' rows, on the first stage; a collective.

        Args:
            own: this rank's rows, contiguous; where there is a ``whole``, its part of that.
            whole: [rows, ...] on the first stage, else None.
            starts: where each rank's rows begin, and where the last one's end, [ranks + 1].
        """
        receivers = (number for number in range(self._num_receivers) if number != self.rank)
        operations = [dist.P2POp(dist.isend, own, self._ranks[number], self._group) for number in receivers]
        if whole is not None:
            for number, (start, end) in enumerate(pairwise(starts)):
                if number != self.rank:
                    operations.append(dist.P2POp(dist.irecv, whole[start:end], self._ranks[number], self._group))
        self._run(operations)

    def _run(self, operations: Iterable[dist.P2POp]) -> None:
        """Nobody sends or waits for what is empty."""
        some = [operation for operation in operations if operation.tensor.numel()]
        for work in dist.batch_isend_irecv(some) if some else ():
            work.wait()


def share_weights(module: torch.nn.Module) -> None:
    """What the first rank of a model copy drew for ``module``, on all its ranks; a collective of them."""
    group = vision_group()
    first = dist.get_process_group_ranks(group)[0]
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.data, src=first, group=group)
