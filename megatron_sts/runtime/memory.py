"""Peak memory of this process: the CUDA allocator's, or on the CPU the resident set of the process."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from megatron_sts.runtime.device import current_device


def reset_peak_memory() -> None:
    """Starts a new measurement."""
    if current_device().is_cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the high-water mark of the resident set


def peak_memory_bytes() -> int:
    """Highest memory in use since the last reset [bytes]."""
    if current_device().is_cuda:
        return torch.cuda.max_memory_allocated()
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024
