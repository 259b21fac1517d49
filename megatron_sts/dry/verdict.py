"""What would go wrong on a cluster, in one line each. Torch-free."""

from __future__ import annotations

from megatron_sts.dry.account import Account
from megatron_sts.launch import trail

GIB = 2**30


class DryRunError(RuntimeError):
    """A rank's step fails. One line: the rank, where it was, and what was said."""


def failure(error: Exception, rank: int, stage: str) -> DryRunError:
    """Of a step that raised ``error``."""
    what = f"{type(error).__name__}: {' '.join(str(error).split()) or 'without a word'}"
    place = trail.where_raised(error, beside="dry")
    phase = trail.PHASES[trail.newest().phase]
    return DryRunError(f"rank {rank}, stage {stage} would fail ({phase}{f', {place}' if place else ''}): {what}")


def too_large(account: Account, memory_gib: float | None) -> list[str]:
    """A line if the rank needs more than a device has (None: no device is asked about)."""
    memory = account.memory
    if memory_gib is None or memory.peak_bytes <= memory_gib * GIB:
        return []
    parts = {
        "weights": memory.weights_bytes + memory.fp8_weights_bytes,
        "gradients": memory.gradients_bytes,
        "optimizer": memory.optimizer_bytes,
        "activations": memory.activations_at_peak_bytes,
    }
    parts["else"] = memory.peak_bytes - sum(parts.values())
    listed = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items())
    largest = max(parts, key=lambda name: parts[name])
    return [
        f"rank {account.rank} (pipeline rank {account.pp_rank}), stage {account.stage} needs {memory.peak_bytes / GIB:.1f} GiB at its "
        f"peak, it may use {memory_gib:.4g}: {listed}; {REMEDIES[largest]}"
    ]


REMEDIES = {
    "weights": "raise parallel.tensor_model_parallel_size or pipeline_model_parallel_size",
    "gradients": "raise parallel.tensor_model_parallel_size or pipeline_model_parallel_size",
    "optimizer": "set parallel.use_distributed_optimizer=true, or raise the parallel sizes",
    "activations": "set parallel.recompute=selective or full, lower batch.micro_batch_size, or raise the parallel sizes",
    "else": "lower batch.micro_batch_size",
}
"""What to do, by what takes most."""
