"""Counts what a block of code executes: FLOPs, communicated bytes, memory. Knows neither model nor config."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from megatron_sts.dry.account import Traffic, Work
from megatron_sts.dry.engine import FP8, KEEP_IN_FP8, RING
from megatron_sts.dry.modules import ModuleNames, is_backward
from megatron_sts.dry.ring import Ring
from megatron_sts.dry.shapes import KnownShapes
from megatron_sts.dry.storages import Ledger, Saved

REPEATED_SHARE = {
    torch.ops.aten._scaled_dot_product_flash_attention_backward: 5,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward: 5,
}
"""Operations that compute again what they did not save: attention its scores, which is one product of so many."""
KINDS = {
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "broadcast_": "broadcast",
    "send": "send",
    "recv_": "recv",
}
"""torch's names of collectives."""


class Counter(TorchDispatchMode):
    """While it is entered, sees every operation. ``name_of`` names process groups; memory is that of tensors on ``device_type``."""

    def __init__(
        self, modules: ModuleNames, name_of: Callable[[dist.ProcessGroup], str], device_type: str = "meta"
    ) -> None:
        super().__init__()
        self.modules, self.ledger = modules, Ledger(device_type)
        self._ring = Ring(self.ledger)
        self._name_of, self._shapes = cache(name_of), KnownShapes()
        self._work: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
        self._traffic: dict[tuple[str, str, int], list[int]] = defaultdict(lambda: [0, 0])

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Counts all that the block does."""
        with ExitStack() as stack:
            # In this order: ``current`` is the module that is entered or left.
            stack.callback(hooks.register_module_forward_hook(self._left).remove)
            stack.enter_context(self.modules.watching())
            stack.callback(hooks.register_module_forward_pre_hook(self._entered).remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack))
            stack.enter_context(self)
            yield

    def begin(self) -> None:
        """Forgets what was counted up to here, but for the tensors that are alive."""
        self._work.clear()
        self._traffic.clear()
        self.ledger.begin()

    @property
    def work(self) -> dict[str, Work]:
        """By module."""
        return {name: Work(*counts) for name, counts in sorted(self._work.items())}

    @property
    def traffic(self) -> tuple[Traffic, ...]:
        """By group and kind."""
        return tuple(Traffic(*key, *counts) for key, counts in sorted(self._traffic.items()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts it."""
        out = self._shapes.run(func, args, kwargs or {})
        packet = func._overloadpacket
        if packet in flop_registry:
            self._count_work(func, args, kwargs or {}, out)
        elif func.namespace == "c10d":
            self._count_traffic(packet.__name__, args)
        for tensor in (out,) if isinstance(out, torch.Tensor) else _tensors(out):
            self.ledger.made(tensor)
        return out

    def _entered(self, _module: torch.nn.Module, inputs: Sequence[Any]) -> None:
        if self.modules.current.on_ring:
            self._ring.entered(inputs)

    def _left(self, _module: torch.nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        if self.modules.current.on_ring:
            self._ring.left(output, self.modules.current)

    def _pack(self, tensor: torch.Tensor) -> Saved:
        saver = self.modules.current
        if saver.on_ring:
            return self._ring.save(tensor, saver)
        if saver.in_fp8 and saver.name.endswith(KEEP_IN_FP8) and not self.ledger.persists(tensor):
            tensor = torch.empty(tensor.shape, dtype=FP8, device=tensor.device)
            self.ledger.made(tensor)
        return self.ledger.save(tensor, saver)

    def _unpack(self, saved: Saved) -> torch.Tensor:
        if is_backward() and not self.modules.is_recomputing:
            self.modules.taken_up(saved.saver)
        if saved.tensor.dtype == FP8:  # any tensor of its shape will do: the real product reads FP8
            return torch.empty(1, dtype=torch.bfloat16, device=saved.tensor.device).expand(saved.tensor.shape)
        return saved.tensor

    def _count_work(self, func: Any, args: Any, kwargs: Mapping[str, Any], out: Any) -> None:
        packet, counts = func._overloadpacket, self._work[self.modules.current.name]
        flops = flop_registry[packet](*args, **kwargs, out_val=out)
        if self.modules.is_recomputing:
            counts[2] += flops
            return
        repeated = flops // REPEATED_SHARE[packet] if packet in REPEATED_SHARE else 0
        counts[1 if is_backward() else 0] += flops - repeated
        counts[2] += repeated
        if _is_causal(func, args):
            counts[3] += flops - repeated

    def _count_traffic(self, name: str, args: Any) -> None:
        kind = KINDS.get(name, name)
        boxes = (each for each in args if isinstance(each, torch.ScriptObject) and _is_group(each))
        group = dist.ProcessGroup.unbox(next(boxes))
        if group.size() == 1:
            return
        # What is gathered, scattered or reduced as a whole is the larger of input and output.
        sizes = [sum(each.nbytes for each in _tensors(each_argument)) for each_argument in args]
        name = self._name_of(group)
        if name == "world" and kind in ("send", "recv"):
            name = "pp"  # with two stages megatron-core sends one way through the group of all ranks
        label, num_bytes = self.modules.current, max(sizes)
        if label.on_ring and name == "cp":
            times = RING[kind] * (group.size() - 1)
            for way in ("send", "recv"):
                self._exchanged(name, way, group.size(), times, times * num_bytes // group.size())
            return
        if label.in_fp8 and kind == "all_gather":
            num_bytes //= torch.bfloat16.itemsize
        self._exchanged(name, kind, group.size(), 1, num_bytes)

    def _exchanged(self, group: str, kind: str, size: int, times: int, num_bytes: int) -> None:
        counts = self._traffic[group, kind, size]
        counts[0] += times
        counts[1] += num_bytes


def _is_causal(func: Any, args: Any) -> bool:
    """Whether an attention was told that it is."""
    names = [argument.name for argument in func._schema.arguments]
    place = names.index("is_causal") if "is_causal" in names else len(args)
    return place < len(args) and bool(args[place])


def _is_group(value: torch.ScriptObject) -> bool:
    return "ProcessGroup" in str(value._type())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
