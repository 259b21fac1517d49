"""Refusals of ``batch.balance`` where there is nothing to deal out, or what it promises would not hold. Torch-free."""

from __future__ import annotations

from megatron_sts.config.errors import refuse
from megatron_sts.config.schema import RunConfig, StageConfig


def check_balance(stage: StageConfig, config: RunConfig) -> None:
    """Every rank can tell what all samples of a step cost, they differ, and it is no matter who computes which."""
    if stage.batch.balance == "off":
        return
    for keys, why, remedy in _hindrances(stage, config):
        refuse(
            f"stages.{stage.name}.batch.balance", stage.batch.balance, f"{keys}: {why}", f"set it to off, or {remedy}"
        )


def _hindrances(stage: StageConfig, config: RunConfig) -> list[tuple[str, str, str]]:
    """(What is set, why that hinders, the remedy)."""
    packing, vision, data = stage.batch.packing, config.model.vision, stage.data or config.data
    found = []
    if data.source == "energon":
        found.append(("data.source=energon", "ranks read shards of their own, and know nothing of each other's samples",
                      "use llava_json or scenes"))  # fmt: skip
    if packing == "pack":
        found.append(("batch.packing=pack", "packed rows are full on every rank as it is", "use packing=pad or none"))
    if vision is not None and vision.tiles is not None:
        found.append(("model.vision.tiles", "what a sample costs shows only when its pictures are decoded",
                      "set model.vision.tiles=null"))  # fmt: skip
    if packing == "pad" and vision is None:
        found.append(
            ("batch.packing=pad", "without images all rows cost the same, padding included", "use packing=none")
        )
    if packing == "none" and config.parallel.pipeline_model_parallel_size > 1:
        found.append(("batch.packing=none", "with pipeline_model_parallel_size > 1 all rows of a step are as long as its longest",
                      "use packing=pad or one pipeline rank"))  # fmt: skip
    if stage.lds is not None and stage.lds.granularity == "microbatch":
        found.append(("lds.granularity=microbatch", "a sample in another micro-batch would skip other layers",
                      "use granularity=step"))  # fmt: skip
    return found
