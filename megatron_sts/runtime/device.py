"""Which device and collective backend this process uses: CUDA with NCCL, or CPU with gloo. Chosen here and nowhere else.

A dry run takes a third one for a while: tensors without memory, and a process group that sends nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Device:
    """Where tensors live and how ranks talk."""

    torch_device: torch.device
    backend: str

    @property
    def is_cuda(self) -> bool:
        return self.torch_device.type == "cuda"

    @property
    def is_meta(self) -> bool:
        """Whether tensors have shapes only: a dry run."""
        return self.torch_device.type == "meta"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch_device) if self.is_cuda else "cpu"

    def synchronize(self) -> None:
        """Waits for queued kernels, so that a clock read next measures finished work."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch_device)


_META = Device(torch.device("meta"), "fake")
_is_meta = False


def current_device() -> Device:
    """The device of this process: ``cuda:LOCAL_RANK`` when CUDA is there, else the CPU; in a dry run ``meta``."""
    return _META if _is_meta else _found_device()


@contextmanager
def on_meta() -> Iterator[None]:
    """``current_device`` is ``meta``, whose tensors have no memory, while the block runs."""
    global _is_meta
    _is_meta = True
    try:
        yield
    finally:
        _is_meta = False


@cache
def _found_device() -> Device:
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(index)
        return Device(torch.device("cuda", index), "nccl")
    return Device(torch.device("cpu"), "gloo")
