"""Layer Dynamic Skipper: which decoder layers a step skips, agreed on by every rank.

Must not know models, megatron, data or the training loop. What is in ``__all__`` is for other people's scripts, and stays (README.md).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_sts.lds.gate import SkipGate
    from megatron_sts.lds.mask import SkipMask, draw_mask
    from megatron_sts.lds.placement import Placement, placed
    from megatron_sts.lds.rounds import active_rounds
    from megatron_sts.lds.schedule import skip_probabilities
    from megatron_sts.lds.sync import MaskMismatchError, MaskPlan

__all__ = [
    "MaskMismatchError",
    "MaskPlan",
    "Placement",
    "SkipGate",
    "SkipMask",
    "active_rounds",
    "draw_mask",
    "placed",
    "skip_probabilities",
]

_MODULES = {
    "MaskMismatchError": "sync",
    "MaskPlan": "sync",
    "Placement": "placement",
    "SkipGate": "gate",
    "SkipMask": "mask",
    "active_rounds": "rounds",
    "draw_mask": "mask",
    "placed": "placement",
    "skip_probabilities": "schedule",
}
"""Imported when first asked for: masks need no torch, agreement on them does."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
