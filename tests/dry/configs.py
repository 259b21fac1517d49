"""Small runs of many shapes that are dry-run."""

from __future__ import annotations

from typing import Any

from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig

MODEL: dict[str, Any] = {
    "vision": {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
    "language": {"num_layers": 4, "hidden_size": 128, "num_attention_heads": 8, "num_query_groups": 4, "ffn_hidden_size": 256,
                 "vocab_size": 512},
}  # fmt: skip
BATCH = {"global_batch_size": 8, "micro_batch_size": 2, "sequence_length": 64}


def run_of(
    *,
    parallel: dict[str, Any] | None = None,
    batch: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    language: dict[str, Any] | None = None,
    params: str = "bf16",
    precision: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    **stage: Any,
) -> Resolved:
    """A run of one stage of 10 steps; the vision tower is frozen unless ``freeze`` is given, and runs on the first stage unless
    ``parallel`` says more."""
    only = {
        "name": "only",
        "freeze": ["vision"],
        "steps": 10,
        "optimizer": {"lr": 1e-3},
        "batch": {**BATCH, **(batch or {})},
        **stage,
    }
    config = {
        "model": {**MODEL, **(model or {}), "language": {**MODEL["language"], **(language or {})}},
        "parallel": {"vision": "first", **(parallel or {})},
        "precision": {"params": params, **(precision or {})},
        "data": data or {},
        "stages": [only],
    }
    return resolve(RunConfig.model_validate(config))
