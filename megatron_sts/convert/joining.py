"""How several Hugging Face tensors lie in one of ours, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

Joining = Literal["same", "stacked", "grouped"]
"""same: one tensor as it is, or viewed in another shape; stacked: one over the other; grouped: for each query group its
queries, its key, its value (megatron-core's fused QKV)."""


def join(joining: Joining, parts: Sequence[torch.Tensor], shape: tuple[int, ...], num_groups: int) -> torch.Tensor:
    """Our tensor of ``shape`` [rows, ...] out of ``parts`` [rows of each, ...]."""
    if joining == "same":
        return parts[0].reshape(shape)
    if joining == "stacked":
        return torch.cat(list(parts))
    by_group = [part.reshape(num_groups, -1, *part.shape[1:]) for part in parts]
    return torch.cat(by_group, dim=1).reshape(shape)


def split(
    joining: Joining, whole: torch.Tensor, shapes: Sequence[tuple[int, ...]], num_groups: int
) -> list[torch.Tensor]:
    """The inverse of ``join``: contiguous tensors of ``shapes``."""
    if joining == "same":
        return [whole.reshape(shapes[0])]
    rows = [shape[0] for shape in shapes]
    if joining == "stacked":
        return [part.contiguous() for part in whole.split(rows)]
    by_group = whole.reshape(num_groups, -1, *whole.shape[1:]).split([count // num_groups for count in rows], dim=1)
    return [part.reshape(shape) for part, shape in zip(by_group, shapes, strict=True)]
