"""Peak memory of this process: the CUDA allocator's, or on the CPU the resident set of the process."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_sts.runtime.device import current_device

_earlier_bytes = 0
"""A peak from before what was measured apart."""


def reset_peak_memory() -> None:
    """Starts a new measurement; where the kernel does not allow that on the CPU, the peak stays that of the process so far."""
    global _earlier_bytes
    _earlier_bytes = 0
    if current_device().is_cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        # Linux: resets the high-water mark of the resident set. Some sandboxes forbid it.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Highest memory in use since the last reset [bytes]."""
    return max(_earlier_bytes, _since_reset())


def take_apart[T](work: Callable[[], T]) -> tuple[T, int]:
    """What ``work`` gives, and the highest memory in use meanwhile [bytes], which counts for no other measurement."""
    global _earlier_bytes
    earlier = peak_memory_bytes()
    reset_peak_memory()
    try:
        return work(), _since_reset()
    finally:
        reset_peak_memory()
        _earlier_bytes = earlier


def _since_reset() -> int:
    if current_device().is_cuda:
        return torch.cuda.max_memory_allocated()
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024
