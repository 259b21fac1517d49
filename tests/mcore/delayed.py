"""Delayed scaling in a few lines, as Transformer Engine does it: one table of largest values for all modules of a rank.

A module's column is given out when it first runs. After each micro-batch the newest row is reduced over the ranks, by
column, and each module's scale follows from its column's history; without anything in it, it stays.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

FP8_MAX = float(torch.finfo(torch.float8_e4m3fn).max)


class AmaxTable:
    """History [history_len, modules], newest row first, and what each module divides by."""

    def __init__(self, history_len: int) -> None:
        self.columns: list[str] = []
        self.history = torch.zeros(history_len, 0)
        self.scales = torch.ones(0)

    def see(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Module ``name`` runs on ``x``: notes its largest value, returns x rounded with the scale of the history."""
        if name not in self.columns:
            self.columns.append(name)
            self.history = torch.cat([self.history, torch.zeros(len(self.history), 1)], dim=1)
            self.scales = torch.cat([self.scales, torch.ones(1)])
        column, scale = self.columns.index(name), self.scale(name)
        self.history[0, column] = torch.maximum(self.history[0, column], x.abs().max())
        return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(torch.float32) * scale

    def end_microbatch(self, group: dist.ProcessGroup | None = None) -> None:
        """Reduces the newest row, whatever module each rank has in a column, and opens the next."""
        newest = self.history[0].clone()
        if dist.is_initialized():
            dist.all_reduce(newest, op=dist.ReduceOp.MAX, group=group)
        self.history[0] = newest
        largest = self.history.amax(0)
        self.scales = torch.where(largest > 0, largest / FP8_MAX, self.scales)
        self.history = self.history.roll(1, 0)
        self.history[0] = 0

    def scale(self, name: str) -> float:
        """Largest value of the module's history / FP8's largest; 1 before there is any."""
        return float(self.scales[self.columns.index(name)])
