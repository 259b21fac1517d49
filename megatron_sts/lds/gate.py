"""What each decoder layer asks before it runs."""

from __future__ import annotations

from megatron_sts.lds.mask import SkipMask


class SkipGate:
    """Holds the current step's mask; all decoder layers of a rank share one gate. Without a mask nothing is skipped.

    Set it before the first forward pass of a step and keep it until the optimizer has stepped. Within that time it
    must not change: under a 1F1B schedule several micro-batches are in flight at once, so forward passes of one
    alternate with backward passes of another; and activation recomputation calls a layer a second time during the
    backward pass, which must take the path that the forward pass took. Clear it for evaluation.
    """

    def __init__(self) -> None:
        self._mask: SkipMask | None = None

    @property
    def mask(self) -> SkipMask | None:
        return self._mask

    def set(self, mask: SkipMask) -> None:
        self._mask = mask

    def clear(self) -> None:
        self._mask = None

    def skips(self, layer: int) -> bool:
        """Whether to skip decoder layer ``layer``, 0-based over the whole model (not over a pipeline chunk)."""
        return self._mask is not None and self._mask.skips(layer)
