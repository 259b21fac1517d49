"""Runs with all that is left to planning: ``parallel.layout: auto`` and ``precision.fp8_where: auto``. Torch-free."""

from __future__ import annotations

from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.plan.layout import choose_layout
from megatron_sts.plan.timing.products import choose_bf16_products


def resolve_planned(config: RunConfig, *, world_size: int | None = None) -> Resolved:
    """``config.resolve.resolve``, with what that asks for."""
    return resolve(
        config, world_size=world_size, choose_layout=choose_layout, choose_bf16_products=choose_bf16_products
    )
