"""What FP8 modules need from the training loop: fresh weights each step, and scales in the same order on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_sts.config.precision import Product
from megatron_sts.runtime.device import current_device
from megatron_sts.runtime.dist import differs


class ScaleOrderError(RuntimeError):
    """Ranks would read each other's scales. Raised on every rank of the run."""


class Fp8Modules:
    """The modules of this rank's chunks, vision tower and projector included, that keep weights in FP8 from one micro-batch
    to the next.

    ``watch_order``: record in which order they first run, for ``check_order``. Delayed scaling keeps the largest values of
    all modules in one table in this order, and reduces the table over the ranks that share the layers.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], *, watch_order: bool = False) -> None:
        named = [
            (f"{index}.{name}", module)
            for index, chunk in enumerate(chunks)
            for name, module in chunk.named_modules()
            if hasattr(module, "is_first_microbatch")
        ]
        self._modules: list[Any] = [module for _, module in named]
        self._scaled: list[Any] = [
            module for chunk in chunks for module in chunk.modules() if hasattr(module, "fp8_meta")
        ]
        self._order: list[str] = []
        self._watching = watch_order  # whatever this rank has: the check is a collective of all
        self._hooks = [
            module.register_forward_pre_hook(partial(self._ran, name)) for name, module in named if watch_order
        ]

    def begin_step(self) -> None:
        """Before a step's first forward pass: weights moved, so that whatever runs first casts them anew.

        A layer that the first micro-batch skips keeps the mark until one runs it.
        """
        for module in self._modules:
            module.is_first_microbatch = True

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Passes within it are of no step: they cast weights anew, and delayed scaling's tables are afterwards what they were."""
        self.begin_step()
        tables = [table for module in self._scaled for table in _tables(module.fp8_meta)]
        before = [table.clone() for table in tables]
        try:
            yield
        finally:
            for table, values in zip(tables, before, strict=True):
                table.copy_(values)  # in place: Transformer Engine reduces views of them

    def check_order(self) -> None:
        """After the first step: all ranks that share these modules ran them in the same order. A collective, once.

        Raises:
            ScaleOrderError: on every rank of the run.
        """
        if not self._watching:
            return
        self._watching = False
        for hook in self._hooks:
            hook.remove()
        group = parallel_state.get_amax_reduction_group(with_context_parallel=True)
        digest = hashlib.sha256("\n".join(self._order).encode()).digest()
        wrong = torch.tensor(int(differs(digest, group)), device=current_device().torch_device)
        dist.all_reduce(wrong, op=dist.ReduceOp.MAX)
        if wrong.item():
            raise ScaleOrderError(
                f"precision.fp8=delayed: ranks that share layers first ran their {len(self._order)} FP8 modules here in "
                f"different orders (digest {digest.hex()[:16]}), so that scales would be mixed up; every rank must run "
                "all layers in its first micro-batch"
            )

    def _ran(self, name: str, _module: torch.nn.Module, _inputs: Any) -> None:
        if name not in self._order:
            self._order.append(name)


def _tables(meta: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Of a module under delayed scaling: its scales, and the largest values that they follow from."""
    for state in meta.values():
        for name in ("scale", "amax_history"):
            if isinstance(table := getattr(state, name, None), torch.Tensor):
                yield table


def fp8_unless_few(config: TransformerConfig, num_tokens: int, min_tokens: int) -> AbstractContextManager[Any]:
    """A context in which a layer multiplies in FP8, or with fewer than ``min_tokens`` in its parameters' format."""
    return outside_fp8() if config.fp8 and num_tokens < min_tokens else nullcontext()


def outside_fp8() -> AbstractContextManager[Any]:
    """A context in which Transformer Engine's modules multiply in their parameters' format."""
    from transformer_engine.pytorch import fp8_autocast

    context: AbstractContextManager[Any] = fp8_autocast(enabled=False)
    return context


class LeavesFp8(torch.nn.Module):
    """Of a linear layer, whatever makes it multiply in FP8: whether it does so in the stage that runs."""

    leaves_fp8 = False
    """It multiplies in its parameters' format. ``leave_fp8`` sets it."""


class _LeavesContext(LeavesFp8):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with outside_fp8() if self.leaves_fp8 else nullcontext():
            return super().forward(*args, **kwargs)


@cache
def able_to_leave(linear: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """The same linear layer of Transformer Engine's, with its weights' names, which can leave the FP8 context around it. How it
    multiplied forward decides its backward pass."""
    return type(f"{linear.__name__}AbleToLeave", (_LeavesContext, linear), {})


def leave_fp8(chunks: Sequence[torch.nn.Module], products: Collection[Product]) -> None:
    """From now on these products of all decoder layers multiply in their parameters' format, and the others in FP8.

    What a module that leaves kept of its weight in FP8 is freed.
    """
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if isinstance(module, LeavesFp8):
                module.leaves_fp8 = name.rpartition(".linear_")[2] in products
                if module.leaves_fp8:
                    getattr(module, "_fp8_workspaces", {}).clear()  # Transformer Engine's ``module/base.py``
