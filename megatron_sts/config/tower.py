"""Where the vision tower runs: what of ``parallel.vision`` makes sense, and what follows where it is not written. Torch-free."""

from __future__ import annotations

from typing import Literal

from megatron_sts.config.errors import refuse
from megatron_sts.config.schema import RunConfig

IMAGES_AT_ONCE = 16
"""A rank's share of a step's images goes through a tower that is spread in so many, for which alone there are activations."""


def check_tower(config: RunConfig) -> None:
    """Only a tower that never learns is spread: no backward pass goes through what is encoded before the passes."""
    if config.parallel.vision != "spread":
        return
    field, remedy = "parallel.vision", "set it to first or null"
    if config.model.vision is None:
        refuse(field, "spread", "model.vision is null, so there is no tower", remedy)
    if learning := _learns_in(config):
        refuse(field, "spread", f"the tower learns in stages.{learning}", f"{remedy}, or add vision to its freeze")


def place_of_tower(config: RunConfig, model_parallel_size: int) -> Literal["first", "spread"]:
    """As written; else on all ranks of a copy of the model where it never learns. One rank alone has it on the first stage."""
    if model_parallel_size == 1:
        return "first"
    can_spread = config.model.vision is not None and _learns_in(config) is None
    return config.parallel.vision or ("spread" if can_spread else "first")


def _learns_in(config: RunConfig) -> str | None:
    """The first stage that does not freeze the tower."""
    return next((stage.name for stage in config.stages if "vision" not in stage.freeze), None)
