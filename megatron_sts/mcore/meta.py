"""Lets a training step run without devices and without peers: as any rank of any world, on tensors that have shapes only.

Real are all modules, schedules, optimizers, and every collective's shape, group and order. Not real are values: what is read from
a tensor is ``READ`` for a number with a fraction (a loss, a norm) and 0 for any other (no rank differs, nothing overflowed).
Everything that makes this possible is here; only dry runs use it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fusions import fused_cross_entropy
from torch._C._distributed_c10d import FakeWork
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_sts.mcore.replaced import replaced
from megatron_sts.runtime import probe
from megatron_sts.runtime.device import on_meta

READ = 1.0
_UNPATCHED_SDPA = functional.scaled_dot_product_attention
_UNPATCHED_RMS_NORM = functional.rms_norm
_NO_META_KERNEL = (
    "send",
    "recv_",
    "allreduce_coalesced_",
    "allgather_into_tensor_coalesced_",
    "reduce_scatter_tensor_coalesced_",
)
"""Operations of torch's process groups that know no meta tensors."""


@contextmanager
def meta_rank(rank: int, world_size: int) -> Iterator[None]:
    """This process is ``rank`` of ``world_size`` while the block runs; on CPU-only processes that are in no process group."""
    if dist.is_initialized():
        raise RuntimeError("a dry run needs a process that is in no process group")
    if torch.cuda.is_available():
        raise RuntimeError("a dry run needs a process without CUDA devices: set CUDA_VISIBLE_DEVICES to nothing")
    _register_kernels()
    with ExitStack() as stack:
        stack.enter_context(on_meta())
        for owner, name, value in _stand_ins():
            stack.enter_context(replaced(owner, name, value))
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        stack.callback(dist.destroy_process_group)
        stack.callback(parallel_state.destroy_model_parallel)
        yield


def _stand_ins() -> Iterator[tuple[Any, str, Any]]:
    """(owner, attribute, what stands there during a dry run)."""
    initialize, new_group, tensor = parallel_state.initialize_model_parallel, dist.new_group, torch.Tensor
    yield parallel_state, "initialize_model_parallel", functools.partial(initialize, create_gloo_process_groups=False)
    for name in ("get_data_parallel_group_gloo", "get_expert_data_parallel_group_gloo"):
        yield parallel_state, name, lambda *_a, **_k: None
    yield probe, "usable_here", lambda _importer: (frozenset({"cuda"}), ())  # what torch's layers take on a GPU
    yield dist, "new_group", lambda *args, **kwargs: new_group(*args, **{**kwargs, "backend": "fake"})
    yield dist, "batch_isend_irecv", _one_by_one
    yield functional, "scaled_dot_product_attention", _attention
    yield functional, "rms_norm", _rms_norm
    yield fused_cross_entropy, "calculate_predicted_logits", _predicted(fused_cross_entropy.calculate_predicted_logits)
    yield torch, "tensor", _tensor_of(torch.tensor)
    yield tensor, "type", _type_as_cuda(tensor.type)
    yield tensor, "cpu", _on_meta(tensor.cpu, lambda tensor: tensor)
    yield tensor, "item", _on_meta(tensor.item, _number)
    yield tensor, "tolist", _on_meta(tensor.tolist, _numbers)
    for name, kind in (("__float__", float), ("__int__", int), ("__bool__", bool)):
        yield tensor, name, _on_meta(getattr(tensor, name), _as(kind))


@functools.cache
def _register_kernels() -> torch.library.Library:
    """For good, as torch does it: they are for meta tensors only."""
    library = torch.library.Library("c10d", "IMPL")
    for name in _NO_META_KERNEL:
        library.impl(name, lambda *_a, **_k: FakeWork().boxed(), "Meta")
    return library


def _one_by_one(operations: Sequence[dist.P2POp]) -> list[dist.Work]:
    works = (each.op(each.tensor, each.peer, group=each.group, tag=each.tag) for each in operations)
    return [work for work in works if work is not None]


def _on_meta(real: Callable[..., Any], stand_in: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    @functools.wraps(real)
    def read(tensor: torch.Tensor, *args: Any) -> Any:
        return stand_in(tensor) if tensor.is_meta else real(tensor, *args)

    return read


def _number(tensor: torch.Tensor) -> float | int:
    if tensor.numel() != 1:
        raise RuntimeError(f"a number is read from a tensor of shape {list(tensor.shape)}")
    return READ if tensor.is_floating_point() else 0


def _numbers(tensor: torch.Tensor) -> Any:
    if tensor.dim() == 0:
        return _number(tensor)
    return [_numbers(part) for part in tensor.unbind()] if tensor.dim() > 1 else [_number(tensor[:1])] * len(tensor)


def _as(kind: type) -> Callable[[torch.Tensor], Any]:
    return lambda tensor: kind(_number(tensor))


def _tensor_of(real: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """``torch.tensor`` of a list of meta tensors, as megatron-core makes of gradient norms."""

    @functools.wraps(real)
    def tensor(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        is_list = isinstance(data, (list, tuple)) and bool(data) and isinstance(data[0], torch.Tensor)
        return torch.stack(list(data)) if is_list and data[0].is_meta else real(data, *args, **kwargs)

    return tensor


def _type_as_cuda(real: Callable[..., Any]) -> Callable[..., Any]:
    def type_as_cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = real(tensor, *args, **kwargs)
        return name.replace("torch.cuda.meta.", "torch.cuda.") if isinstance(name, str) else name

    return type_as_cuda


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What torch takes on a GPU: flash attention, or with a mask its memory-efficient kernel, which knows no groups. Neither keeps
    the scores; for meta tensors torch itself would take the kernel that does.
    """
    if not query.is_meta:
        return _UNPATCHED_SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
    bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
    bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]


def _rms_norm(
    x: torch.Tensor, normalized_shape: Sequence[int], weight: torch.Tensor | None = None, eps: float | None = None
) -> torch.Tensor:
    """What torch takes on a GPU: the fused norm. Of meta tensors, as on a CPU, torch itself would keep two copies in fp32."""
    if not x.is_meta:
        return _UNPATCHED_RMS_NORM(x, normalized_shape, weight, eps)
    normalised: torch.Tensor = _FusedRmsNorm.apply(x, weight)
    return normalised


def _predicted(real: Callable[..., Any]) -> Callable[..., Any]:
    """A part of megatron-core's fused cross entropy as it is when compiled: what it gives is not in its argument's memory."""

    @functools.wraps(real)
    def predicted(*args: Any) -> Any:
        target_mask, masked_target, sums, exp_logits = real(*args)
        return target_mask, masked_target, sums, exp_logits.clone()

    return predicted


class _FusedRmsNorm(torch.autograd.Function):
    """Shapes of ``aten::_fused_rms_norm`` over the last dimension, and what it keeps: its input and fp32 inverse deviations."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        x, weight, _ = ctx.saved_tensors
        of_x, of_weight = ctx.needs_input_grad
        return torch.empty_like(x) if of_x else None, torch.empty_like(weight) if of_weight else None
