"""What megatron-core's optimizers pair up, and how a step leaves whole layers out of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import compress

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, MegatronOptimizer

Groups = list[list[torch.nn.Parameter]]


def paired_groups(part: MegatronOptimizer) -> list[tuple[str, str]]:
    """Names of the attributes that hold model parameters and, in the same order, what Adam updates for them.

    That is a shard, a master copy, or the parameter itself. Empty for an optimizer without copies of its own.
    """
    if isinstance(part, DistributedOptimizer):
        return [
            ("model_float16_groups", "shard_fp32_from_float16_groups"),
            ("model_fp32_groups", "shard_fp32_groups"),
        ]
    if isinstance(part, Float16OptimizerWithFloat16Params):
        return [("float16_groups", "fp32_from_float16_groups"), ("fp32_from_fp32_groups", "fp32_from_fp32_groups")]
    return []


def param_pairs(part: MegatronOptimizer) -> Iterator[tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    """Pairs (model parameter, the tensor that Adam updates for it on this rank)."""
    names = paired_groups(part)
    groups: list[tuple[Groups, Groups]] = [(getattr(part, owned), getattr(part, updated)) for owned, updated in names]
    if not names:
        own = [group["params"] for group in part.param_groups]
        groups = [(own, own)]
    for owned, updated in groups:
        for pair in zip(owned, updated, strict=True):
            yield from zip(*pair, strict=True)


@contextmanager
def leaving_out(part: MegatronOptimizer, layers: Collection[int]) -> Iterator[None]:
    """While it lasts, ``part`` copies neither gradients from nor parameters to the decoder layers in ``layers``."""
    saved: dict[str, Groups] = {}
    for names in paired_groups(part):
        owned: Groups = getattr(part, names[0])
        stays = [[getattr(p, "decoder_layer", None) not in layers for p in group] for group in owned]
        for name in dict.fromkeys(names):
            saved[name] = getattr(part, name)
            setattr(part, name, [list(compress(*pair)) for pair in zip(saved[name], stays, strict=True)])
    try:
        yield
    finally:
        for name, groups in saved.items():
            setattr(part, name, groups)
