"""Which module is at work: names for what is counted, forward, backward and while a layer is run again."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules import module as hooks

OUTSIDE = "step"
"""Work of no module: the loss, gradients, the update."""
ROOT = "vtc"
"""Work of the model itself and of none of its parts."""


@dataclass(frozen=True)
class Label:
    """What is counted of a module is counted here."""

    name: str
    in_fp8: bool = False
    """Whether it is a matrix that multiplies in FP8."""
    on_ring: bool = False
    """Whether it is an attention whose keys and values go round the context-parallel ranks instead of being gathered."""


NOWHERE = Label(OUTSIDE)


class ModuleNames:
    """Knows the module that computes. In a backward pass it is the one that saved what was last taken up again."""

    def __init__(self) -> None:
        self._labels: dict[torch.nn.Module, Label] = {}
        self._stack: list[Label] = []
        self._last_saver = NOWHERE

    def add(
        self,
        model: torch.nn.Module,
        in_fp8: Collection[torch.nn.Module] = (),
        on_ring: Collection[torch.nn.Module] = (),
    ) -> None:
        """The modules of a chunk, by their names without numbers of layers."""
        for name, module in model.named_modules():
            short = re.sub(r"\.\d+(?=\.|$)", "", name) or ROOT
            self._labels[module] = Label(short, module in in_fp8, module in on_ring)

    @property
    def current(self) -> Label:
        """Forward: the innermost module that runs."""
        return self._stack[-1] if self._stack else self._last_saver

    @property
    def is_recomputing(self) -> bool:
        """Whether a forward pass runs within a backward pass."""
        return bool(self._stack) and is_backward()

    def taken_up(self, saver: Label) -> None:
        """The backward pass goes on with what ``saver`` saved."""
        self._last_saver = saver

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Follows the modules while the block runs."""
        with ExitStack() as stack:
            for handle in (
                hooks.register_module_forward_pre_hook(self._enter),
                hooks.register_module_forward_hook(self._leave, always_call=True),
            ):
                stack.callback(handle.remove)
            yield

    def _enter(self, module: torch.nn.Module, _inputs: Sequence[Any]) -> None:
        outer = self._stack[-1] if self._stack else NOWHERE
        self._stack.append(self._labels.get(module, outer))

    def _leave(self, _module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        label = self._stack.pop()
        if label.in_fp8 and (result := output[0]).requires_grad:
            # Its backward pass may begin with a gather, before it takes up anything that was saved.
            result.register_hook(lambda _: self.taken_up(label))
        if not self._stack:
            self._last_saver = NOWHERE


def is_backward() -> bool:
    """Whether autograd runs."""
    return bool(torch._C._current_graph_task_id() != -1)
