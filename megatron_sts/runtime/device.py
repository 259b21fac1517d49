"""Which device and collective backend this process uses: CUDA with NCCL, or CPU with gloo. Chosen here and nowhere else."""

from __future__ import annotations

import os
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
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch_device) if self.is_cuda else "cpu"

    def synchronize(self) -> None:
        """Waits for queued kernels, so that a clock read next measures finished work."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch_device)


@cache
def current_device() -> Device:
    """The device of this process: ``cuda:LOCAL_RANK`` when CUDA is there, else the CPU."""
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0"))
        torch.cuda.set_device(index)
        return Device(torch.device("cuda", index), "nccl")
    return Device(torch.device("cpu"), "gloo")
