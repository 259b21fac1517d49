"""How several samples share a row, worked out on the host: whoever asks a device for lengths waits until it has computed all else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad


@dataclass(frozen=True)
class Packing:
    """Of the packed rows [b, s] of a micro-batch. A segment is a run of equal numbers: a sample with its padding, or what follows
    the last one."""

    segments: torch.Tensor
    """int32 [b, s]: which segment a token belongs to."""
    starts: torch.Tensor
    """int32 [k + 1]: where the k segments of row after row start, and where the last one ends."""
    longest: int
    """Tokens of the longest."""
    order: torch.Tensor | None
    """int64 [b, s], with context parallelism: the tokens of the first rank, of the second, and so on. Of each segment a rank computes
    the piece that it has of a row without packing: see ``mcore/context.py``."""

    def to(self, device: torch.device) -> Packing:
        """The same on ``device``."""
        order = None if self.order is None else self.order.to(device, non_blocking=True)
        segments, starts = (each.to(device, non_blocking=True) for each in (self.segments, self.starts))
        return Packing(segments, starts, self.longest, order)


def describe_packing(segments: torch.Tensor, num_ranks: int = 1) -> Packing:
    """Of ``segments`` int [b, s], on the CPU.

    ``num_ranks``: context-parallel ones; each segment is a multiple of twice as many tokens long if there are several.
    """
    is_first = pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    starts = pad(is_first.flatten(), (0, 1), value=True).nonzero().flatten().to(torch.int32)
    order = _rank_after_rank(is_first, num_ranks) if num_ranks > 1 else None
    return Packing(segments, starts, int(starts.diff().max()), order)


def _rank_after_rank(is_first: torch.Tensor, num_ranks: int) -> torch.Tensor:
    """``Packing.order``. ``is_first`` bool [b, s]: of its segment."""
    length = is_first.shape[1]
    places = torch.arange(length)
    is_last = is_first.roll(-1, dims=1)
    starts = torch.where(is_first, places, 0).cummax(dim=1).values
    ends = torch.where(is_last, places + 1, length).flip(1).cummin(dim=1).values.flip(1)
    piece = (places - starts) * 2 * num_ranks // (ends - starts)
    return torch.minimum(piece, 2 * num_ranks - 1 - piece).argsort(dim=1, stable=True)
