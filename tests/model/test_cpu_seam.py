"""The CPU stand-in leaves torch's own device contexts alone."""

from __future__ import annotations

import torch

import megatron_sts.mcore  # noqa: F401


def test_meta_context_still_allocates_nothing() -> None:
    with torch.device("meta"):
        assert torch.empty(3).is_meta and torch.nn.Linear(2, 2).weight.is_meta
