"""Lets megatron-core run unchanged on CPU and gloo. Never active when CUDA is available; ``meta.py`` alone builds on it.

megatron-core takes its device from ``torch.cuda.current_device()``, writes ``device="cuda"`` in a few factory calls, moves
tensors with ``.cuda()`` and asks ``tensor.type()`` for CUDA class names. Each of these gets a CPU answer here. The random
state trackers use the CPU generator. Everything else (layers, schedules, optimizers, collectives) is the real thing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_sts.runtime.device import current_device

_FACTORIES = (
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "arange",
    "rand",
    "randn",
    "empty_like",
    "zeros_like",
    "ones_like",
)


class _NoStream:
    """Stands for the current CUDA stream where code only orders streams against each other."""

    def wait_stream(self, _other: object) -> None: ...

    def wait_event(self, _event: object) -> None: ...


def _creates_here(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = current_device().torch_device
        return factory(*args, **kwargs)

    return create


def _install_devices() -> None:
    torch.cuda.current_device = lambda: current_device().torch_device  # type: ignore[assignment,return-value]
    torch.cuda.current_stream = lambda *_a, **_k: _NoStream()  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_a, **_k: None
    torch.cuda.empty_cache = lambda: None
    _device_constructors()  # caches the real factories now, or `with torch.device("meta")` would no longer know them
    for name in _FACTORIES:
        setattr(torch, name, _creates_here(getattr(torch, name)))


def _install_tensor_methods() -> None:
    real_type = torch.Tensor.type

    def type_as_cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return real_type(tensor, *args, **kwargs)
        return real_type(tensor).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_as_cuda  # type: ignore[assignment]
    torch.Tensor.cuda = lambda tensor, *_a, **_k: tensor  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda module, *_a, **_k: module  # type: ignore[method-assign]


def _import_megatron_random() -> Any:
    """Imports megatron-core with its fusions left eager: compiling them pays on GPUs only, and costs seconds here."""
    compile_function, torch.compile = torch.compile, lambda function: function  # type: ignore[assignment]
    try:
        from megatron.core.tensor_parallel import random
    finally:
        torch.compile = compile_function
    return random


def _install_random_state() -> None:
    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *_a, **_k: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *_a, **_k: torch.set_rng_state(state)
    random = _import_megatron_random()

    def get_state(*_args: Any, **_kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *_args: Any, **_kwargs: Any) -> None:
        torch.set_rng_state(state)

    class CpuRngStatesTracker(random.CudaRNGStatesTracker):  # type: ignore[name-defined]
        """The tracker without its check that the CPU generator stays untouched: here that generator is the one tracked."""

        @contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    random._get_cuda_rng_state = get_state
    random._set_cuda_rng_state = set_state
    random.CudaRNGStatesTracker = CpuRngStatesTracker


def _install_gradient_scaling() -> None:
    """megatron-core scales and sums lists of tensors with kernels of Transformer Engine or apex as soon as one imports."""
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.utils import (
        local_multi_tensor_applier,
        local_multi_tensor_l2_norm,
        local_multi_tensor_scale,
    )

    clip_grads.l2_norm_impl = local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = local_multi_tensor_applier
        module.multi_tensor_scale_impl = local_multi_tensor_scale


def install() -> None:
    """Installs the stand-ins once per process. Must run before anything else imports megatron-core."""
    _install_devices()
    _install_tensor_methods()
    _install_random_state()
    _install_gradient_scaling()
