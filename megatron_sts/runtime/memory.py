"""Peak memory of this process: the CUDA allocator's, or on the CPU the resident set of the process."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import torch

from megatron_sts.runtime.device import current_device


def reset_peak_memory() -> None:
    """Starts a new measurement; where the kernel does not allow that on the CPU, the peak stays that of the process so far."""
    if current_device().is_cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        # Linux: resets the high-water mark of the resident set. Some sandboxes forbid it.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Highest memory in use since the last reset [bytes]."""
    if current_device().is_cuda:
        return torch.cuda.max_memory_allocated()
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024
