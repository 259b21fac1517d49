"""Whether ranks hold anything alike that they could compare. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_sts.config.resolve import Resolved


def without_replicas(resolved: Resolved) -> Iterator[str]:
    """One line if comparisons of what ranks hold alike are asked for, and no two ranks do."""
    parallel, interval = resolved.config.parallel, resolved.config.guard.checksum_interval_steps
    copies = resolved.data_parallel_size * parallel.context_parallel_size * parallel.tensor_model_parallel_size
    is_tied = resolved.config.model.language.tie_word_embeddings and parallel.pipeline_model_parallel_size > 1
    if interval is not None and copies == 1 and not is_tied and not resolved.spreads_vision:
        yield f"guard.checksum_interval_steps={interval}: no two ranks hold the same weights here, so that nothing is compared"
