"""Bytes of all tensors that are alive, and of those that backward passes wait for."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable

import torch

from megatron_sts.dry.modules import Label


class Ledger:
    """Every storage from the operation that made it to its end, and which of them autograd saved, by module."""

    def __init__(self, device_type: str) -> None:
        self._device_type = device_type
        self._sizes: dict[int, int] = {}
        self._ends: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._saved: dict[int, list[int]] = {}
        """Of each storage that is saved: how often."""
        self._savers: dict[int, str] = {}
        self._by_module: Counter[str] = Counter()
        self._persistent: set[int] = set()
        self.live_bytes = self.saved_bytes = 0
        self.peak_live_bytes = self.saved_at_peak_bytes = self.peak_saved_bytes = 0
        self.peak_by_module: dict[str, int] = {}

    def made(self, tensor: torch.Tensor) -> None:
        """An operation returned ``tensor``; of those without memory of their own nothing is counted, nor of other devices'."""
        if tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = size
        self._ends[key] = weakref.ref(storage, self._ending(key))
        self.live_bytes += size
        if self.live_bytes > self.peak_live_bytes:
            self.peak_live_bytes, self.saved_at_peak_bytes = self.live_bytes, self.saved_bytes

    def persist(self, tensors: Iterable[torch.Tensor]) -> None:
        """These are there whether or not autograd saves them."""
        self._persistent.update(tensor.untyped_storage()._cdata for tensor in tensors)

    def persists(self, tensor: torch.Tensor) -> bool:
        """Whether it was said to."""
        return tensor.untyped_storage()._cdata in self._persistent

    def save(self, tensor: torch.Tensor, saver: Label) -> Saved:
        """Autograd keeps ``tensor`` until the result is let go of."""
        key = tensor.untyped_storage()._cdata
        if tensor.device.type != self._device_type or key in self._persistent:
            return Saved(tensor, saver, None)
        self.made(tensor)
        if key in self._saved:
            self._saved[key][0] += 1
        else:
            size = self._sizes[key]
            self._saved[key], self._savers[key] = [1], saver.name
            self._by_module[saver.name] += size
            self.saved_bytes += size
        return Saved(tensor, saver, lambda: self._let_go(key))

    def begin(self) -> None:
        """Peaks are those from here on."""
        self.peak_live_bytes, self.saved_at_peak_bytes = self.live_bytes, self.saved_bytes
        self.peak_saved_bytes, self.peak_by_module = 0, {}

    def end(self) -> None:
        """After this the peaks are whole."""
        self._note_peak()

    def _note_peak(self) -> None:
        """Called before the sum falls: whatever rises needs no look."""
        if self.saved_bytes > self.peak_saved_bytes:
            self.peak_saved_bytes = self.saved_bytes
            self.peak_by_module = {name: size for name, size in self._by_module.items() if size}

    def _let_go(self, key: int) -> None:
        uses = self._saved[key]
        uses[0] -= 1
        if uses[0]:
            return
        self._note_peak()
        del self._saved[key]
        size = self._sizes[key]
        self._by_module[self._savers.pop(key)] -= size
        self.saved_bytes -= size

    def _ending(self, key: int) -> Callable[[object], None]:
        def ended(_reference: object) -> None:
            self.live_bytes -= self._sizes.pop(key)
            self._persistent.discard(key)  # another storage may come to lie there
            del self._ends[key]

        return ended


class Saved:
    """What autograd holds in place of a tensor."""

    __slots__ = ("_let_go", "also", "saver", "tensor")

    def __init__(self, tensor: torch.Tensor, saver: Label, let_go: Callable[[], None] | None) -> None:
        self.tensor, self.saver, self._let_go = tensor, saver, let_go
        self.also: list[Saved] = []
        """What is kept as long as this."""

    def __del__(self) -> None:
        if self._let_go is not None:
            self._let_go()
