"""RoPE and SwiGLU of the torch layers, with backward passes of their own: the same numbers, fewer copies and saved tensors.

megatron-core's eager versions cut and join tensors (each a copy, and another one backward) where it expects fused kernels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.transformer_config import TransformerConfig


class TorchSelfAttention(SelfAttention):
    """Self-attention that rotates queries and keys as soon as it has them."""

    def forward(self, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:
        """As megatron-core's; ``rotary_pos_emb``: angles of queries and keys, [s, b or 1, 1, d]."""
        angles = (
            rotary_pos_emb if isinstance(rotary_pos_emb, tuple) or rotary_pos_emb is None else (rotary_pos_emb,) * 2
        )
        self._angles = angles
        return super().forward(*args, rotary_pos_emb=None, **kwargs)

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        """``query`` [s, b, n, d], ``key`` and ``value`` [s, b, groups, d]."""
        query, key, value, *rest = super().get_query_key_value_tensors(*args, **kwargs)
        if self._angles is not None:
            query, key = (rotate(each, angles) for each, angles in zip((query, key), self._angles, strict=True))
            self._angles = None
        return query, key, value, *rest


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """RoPE (arXiv 2104.09864) of ``x`` [s, b, n, d] by ``angles`` [s, b or 1, 1, d], whose halves are equal.

    Channel i is rotated with channel i + d/2.
    """
    rotated: torch.Tensor = _Rotate.apply(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grads[0], cos, -sin), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    (left, right), (left_sin, right_sin) = x.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    out = x * cos
    out_left, out_right = out.chunk(2, dim=-1)
    out_left.sub_(right * left_sin)
    out_right.add_(left * right_sin)
    return out


class SwiGlu(torch.nn.Module):
    """silu(gate) * up (arXiv 2002.05202), of the two halves of its input."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, gate_and_up: torch.Tensor) -> torch.Tensor:
        """[..., 2f] -> [..., f]."""
        activated: torch.Tensor = _SwiGlu.apply(gate_and_up)
        return activated


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate_and_up)
        gate, up = gate_and_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (gate_and_up,) = ctx.saved_tensors
        [grad] = grads
        gate, up = gate_and_up.chunk(2, dim=-1)
        both = torch.empty_like(gate_and_up)
        of_gate, of_up = both.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=of_gate)
        torch.mul(grad, F.silu(gate), out=of_up)
        return both
