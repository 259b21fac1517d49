"""Which library computes what: the one place where that is chosen. Must not probe anything itself."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Literal

from megatron_sts.config.errors import refuse
from megatron_sts.config.kernels import KernelsConfig
from megatron_sts.config.precision import PrecisionConfig

ENGINE: Literal["transformer-engine"] = "transformer-engine"
APEX: Literal["apex"] = "apex"
TORCH: Literal["torch"] = "torch"
Library = Literal["transformer-engine", "apex", "torch"]

APEX_ADAM, APEX_FUSION = "amp_C", "fused_weight_gradient_mlp_cuda"
"""apex's CUDA extensions that are used. Its LayerNorm is not: megatron-core's models here have RMSNorm, which it lacks."""


@dataclass(frozen=True)
class Kernels:
    """Which library computes what in the language model."""

    linear: Library
    norm: Library
    attention: Library
    optimizer: Library
    gradient_accumulation_fusion: Literal["apex", "off"]
    """What adds weight gradients to their fp32 buffer within the matrix product, in layers that are torch's."""
    cross_entropy: Literal["megatron-core, fused", "megatron-core"]
    fp8_recipes: tuple[str, ...]
    """Usable values of precision.fp8, besides off."""


def choose_kernels(
    wanted: KernelsConfig, precision: PrecisionConfig, usable: Set[str], recipes: tuple[str, ...]
) -> Kernels:
    """What a run uses.

    Args:
        wanted: the run's ``kernels``.
        precision: its ``precision``; fp8=emulate replaces torch's linear layers.
        usable: of cuda, transformer-engine, torchao and apex's extensions, those that work here.
        recipes: what Transformer Engine offers on this GPU.

    Raises:
        ConfigError: ``wanted`` names what is not usable here.
    """
    fp8, has_engine = precision.fp8, {"cuda", ENGINE} <= usable
    # megatron-core's fused one rounds the logits' gradient to bf16, whatever format it comes in.
    fuses_loss = "cuda" in usable and precision.params == "bf16"
    layers = _layers(wanted, fp8, has_engine)
    return Kernels(
        linear=layers,
        norm=layers,
        attention=layers,
        optimizer=_optimizer(wanted, usable),
        gradient_accumulation_fusion=_fusion(wanted, fp8, usable),
        cross_entropy="megatron-core, fused" if fuses_loss else "megatron-core",
        fp8_recipes=(*(recipes if has_engine else ()), *(("emulate",) if "torchao" in usable else ())),
    )


def _layers(wanted: KernelsConfig, fp8: str, has_engine: bool) -> Library:
    if wanted.layers == ENGINE and not has_engine:
        refuse("kernels.layers", ENGINE, "Transformer Engine is not usable here (megatron-sts doctor says why)",
               "set it to auto")  # fmt: skip
    return ENGINE if has_engine and wanted.layers != TORCH and fp8 != "emulate" else TORCH


def _optimizer(wanted: KernelsConfig, usable: Set[str]) -> Library:
    fused: dict[Library, bool] = {ENGINE: {"cuda", ENGINE} <= usable, APEX: {"cuda", APEX_ADAM} <= usable, TORCH: True}
    if wanted.optimizer == "auto":
        return next(library for library, is_usable in fused.items() if is_usable)
    if not fused[wanted.optimizer]:
        refuse(
            "kernels.optimizer", wanted.optimizer, "not usable here (megatron-sts doctor says why)", "set it to auto"
        )
    return wanted.optimizer


def _fusion(wanted: KernelsConfig, fp8: str, usable: Set[str]) -> Literal["apex", "off"]:
    """Transformer Engine's layers could without apex, but the head and the vision tower are torch's in any case."""
    if wanted.gradient_accumulation_fusion is False or fp8 == "emulate":
        return "off"
    if {"cuda", APEX_FUSION} <= usable:
        return APEX
    if wanted.gradient_accumulation_fusion is True:
        refuse(
            "kernels.gradient_accumulation_fusion", "true", f"it needs a GPU and apex's {APEX_FUSION}", "set it to auto"
        )
    return "off"
