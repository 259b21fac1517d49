"""Lets the real Transformer Engine run where no GPU is, as far as its code is Python: a GPU is
pretended for the whole process, from the import of this file on.

Its modules, recipes, FP8 contexts and tables of largest values are the real ones, as are megatron-core's and ours. What its
CUDA kernels would compute comes from its own reference recipe (``CustomRecipe``, in torch), or is not reached.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

import megatron_sts.mcore  # noqa: F401  # readies megatron-core for the CPU, while torch still says that there is no GPU

BLACKWELL = SimpleNamespace(
    name="a pretended GPU", major=10, minor=0, total_memory=80 * 2**30, multi_processor_count=132
)
"""The first architecture that has every recipe."""


def _pretend_gpu() -> None:
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    torch.cuda.get_device_properties = lambda *_a, **_k: BLACKWELL  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *_a, **_k: (BLACKWELL.major, BLACKWELL.minor)
    torch.cuda.is_current_stream_capturing = lambda: False
    torch.cuda.nvtx.range_push = lambda *_a, **_k: 0
    torch.cuda.nvtx.range_pop = lambda *_a, **_k: 0


def _admit_cpu_tensors() -> None:
    from transformer_engine.pytorch.attention import DotProductAttention
    from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

    for owner, name in ((TransformerEngineBaseModule, "prepare_forward"), (DotProductAttention, "forward")):
        setattr(owner, name, _admitting_cpu_tensors(getattr(owner, name)))


def _admitting_cpu_tensors(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(torch.Tensor, "is_cuda", True):
            return method(*args, **kwargs)

    return call


def _rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, _out: None, quantizer: Any, *_unused: Any
) -> tuple[torch.Tensor, None, torch.Tensor]:
    """``rmsnorm_fwd`` of Transformer Engine's binding; ``x`` [n, h] -> its norm [n, h], no mean, 1 / rms [n]."""
    scale = torch.rsqrt(x.float().square().mean(-1) + epsilon)
    y = (x * scale[:, None] * weight).to(x.dtype)
    return y if quantizer is None else quantizer(y), None, scale


def _rms_norm_backward(
    dy: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, *_unused: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """``rmsnorm_bwd``: gradients of ``x`` and ``weight``."""
    normal, of_normal = x * scale[:, None], dy * weight
    dx = (of_normal - normal * (of_normal * normal).mean(-1, keepdim=True)) * scale[:, None]
    return dx.to(x.dtype), (dy * normal).sum(0).to(weight.dtype)


def _replace_norm_kernels() -> None:
    from transformer_engine.pytorch.module import _common, layernorm_linear
    from transformer_engine.pytorch.ops.basic import rmsnorm

    for module in (_common.tex, layernorm_linear.tex, rmsnorm):
        module.rmsnorm_fwd, module.rmsnorm_bwd = _rms_norm, _rms_norm_backward


def _use_cpu_random_state() -> None:
    from transformer_engine.pytorch import distributed

    distributed._get_cuda_rng_state = lambda *_a, **_k: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, *_a, **_k: torch.set_rng_state(state)


def _use_torch_for_many_tensors() -> None:
    """megatron-core's own functions for gradient norms and copies, as it takes them without Transformer Engine."""
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer

    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_tensor_impl = utils.local_multi_tensor_l2_norm, None


_pretend_gpu()
_admit_cpu_tensors()
_replace_norm_kernels()
_use_cpu_random_state()
_use_torch_for_many_tensors()
