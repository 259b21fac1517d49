"""What Transformer Engine's attention over context-parallel ranks keeps for its backward pass, while torch's is run in its place.

Kept are a rank's own queries, keys, values and output, and the fp32 log-sum-exp; of other ranks' keys and values nothing, which come round again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_sts.dry.modules import Label
from megatron_sts.dry.storages import Ledger, Saved


class Ring:
    """Follows one attention at a time: what it was given, what autograd would save of it, what it returned."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._own: tuple[torch.Tensor, ...] = ()
        self._kept: Saved | None = None

    def entered(self, inputs: Sequence[Any]) -> None:
        """``inputs``: queries, keys and values of this rank, and perhaps a mask."""
        self._own, self._kept = tuple(inputs[:3]), None

    def save(self, tensor: torch.Tensor, saver: Label) -> Saved:
        """In place of what torch's attention keeps: with its queries the rank's keys and values, the log-sum-exp as it is, of anything
        else (gathered keys and values, masks, outputs of single pieces) a tensor of its shape without memory."""
        if tensor.untyped_storage()._cdata == self._own[0].untyped_storage()._cdata:
            saved = self._ledger.save(tensor, saver)
            if self._kept is None:
                self._kept = saved
                saved.also += [self._ledger.save(each, saver) for each in self._own[1:]]
            return saved
        if tensor.dtype == torch.float32 and tensor.dim() == 3:  # [b, n, s]
            return self._ledger.save(tensor, saver)
        placeholder = torch.empty((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)
        return Saved(placeholder, saver, None)

    def left(self, output: torch.Tensor, saver: Label) -> None:
        """``output`` of all pieces is kept, too, if anything is."""
        if self._kept is not None:
            self._kept.also.append(self._ledger.save(output, saver))
        self._own, self._kept = (), None
