"""RoPE and SwiGLU with backward passes of their own are megatron-core's eager ones, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import megatron_sts.mcore  # noqa: F401  before megatron-core
from megatron_sts.mcore.torch_ops import SwiGlu, rotate

Function = Callable[[torch.Tensor], torch.Tensor]


def with_gradient(function: Function, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    out = function(leaf)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype))
    assert leaf.grad is not None
    return out.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_rotation(dtype: torch.dtype, rows: int) -> None:
    from megatron.core.models.common.embeddings.rope_utils import _apply_rotary_pos_emb_bshd

    x = torch.randn(7, 3, 4, 16).to(dtype)
    angles = torch.randn(7, rows, 1, 8).repeat(1, 1, 1, 2)
    found, expected = (
        with_gradient(lambda x, how=how: how(x, angles), x) for how in (rotate, _apply_rotary_pos_emb_bshd)
    )
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype: torch.dtype) -> None:
    def eager(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * (up + 0.0)

    x = torch.randn(5, 2, 24).to(dtype)
    found, expected = (with_gradient(how, x) for how in (SwiGlu(None), eager))  # type: ignore[arg-type]
    assert all(map(torch.equal, found, expected))
