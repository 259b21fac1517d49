"""Runs of one stage that the tests of this folder plan."""

from __future__ import annotations

from typing import Any

from megatron_sts.config.resolve import Layout, Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.plan.candidates import near_even
from megatron_sts.plan.comparison import with_chunks_free
from megatron_sts.plan.layout import choose_layout

BARE = {"hidden_size": 512, "num_attention_heads": 8, "ffn_hidden_size": 2048, "vocab_size": 1}
"""A decoder whose head costs 1/10,000 of a layer."""
SHAPES: dict[str, dict[str, Any]] = {
    "7B": {"hidden_size": 4096, "num_attention_heads": 32, "ffn_hidden_size": 11008, "vocab_size": 32000},
    "70B": {"hidden_size": 8192, "num_attention_heads": 64, "num_query_groups": 8, "ffn_hidden_size": 28672, "vocab_size": 128256},
    "405B": {"hidden_size": 16384, "num_attention_heads": 128, "num_query_groups": 8, "ffn_hidden_size": 53248, "vocab_size": 128256},
}  # fmt: skip
CLIP = {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "image_size": 336, "patch_size": 14}
MICROBATCHES_PER_RANK = 8


def written(
    num_layers: int,
    pp: int,
    lds: dict[str, Any] | None,
    *,
    shape: str | None = None,
    num_microbatches: int | None = None,
    vocab_size: int | None = None,
    **parallel: object,
) -> RunConfig:
    """One stage of 1,000 steps; with a ``shape`` also a frozen CLIP-L in front, else text alone."""
    stage = {
        "name": "only",
        "freeze": ["vision"] if shape else [],
        "steps": 1000,
        "optimizer": {"lr": 1e-4},
        "batch": {
            "global_batch_size": num_microbatches or MICROBATCHES_PER_RANK * pp,
            "micro_batch_size": 1,
            "sequence_length": 4096,
        },
        "lds": lds,
    }
    language = {"num_layers": num_layers, **(SHAPES[shape] if shape else BARE)}
    language["vocab_size"] = vocab_size or language["vocab_size"]
    return RunConfig.model_validate(
        {
            "model": {"vision": CLIP if shape else None, "language": language},
            "parallel": {"pipeline_model_parallel_size": pp, "layout": "auto", **parallel},
            "data": {"mode": "questions" if shape else "words"},
            "stages": [stage],
        }
    )


def draft(*args: Any, **options: Any) -> Resolved:
    """With a layout to plan anew: two chunks a rank where one can have them."""

    def halves(resolved: Resolved) -> Layout:
        pp = resolved.config.parallel.pipeline_model_parallel_size
        return near_even(resolved.config.model.language.num_layers, pp, 2 if pp > 1 else 1)

    return with_chunks_free(resolve(written(*args, **options), choose_layout=halves))


def planned(*args: Any, **options: Any) -> Layout:
    return choose_layout(draft(*args, **options))
