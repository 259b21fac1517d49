"""What each decoder layer asks before it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from megatron_sts.lds.mask import SkipMask


class SkipGate:
    """Holds the current step's mask; all decoder layers of a rank share one gate. Without a mask nothing is skipped.

    Set it before the first forward pass of a step, and tell it before each forward pass which micro-batch that is.
    A layer asks once, in the forward pass: under a 1F1B schedule several micro-batches are in flight at once, and by
    the time one runs backward (and recomputes its activations) the gate stands at another. Clear it for evaluation.
    """

    def __init__(self) -> None:
        self.num_runs: Counter[int] = Counter()
        """How often each decoder layer of this rank ran forward since ``set``, recomputation not counted."""
        self.has_started = False
        """Whether any step has begun: since this process started, not since the run did."""
        self._mask: SkipMask | None = None
        self._row: Sequence[bool] | None = None
        self._residual_scales: Sequence[float] | None = None

    def set(self, mask: SkipMask, residual_scales: Sequence[float] | None = None) -> None:
        """``residual_scales``: for each layer, what its contribution to the residual stream is multiplied by; None: 1."""
        self._mask, self._row, self._residual_scales = mask, mask.row(0), residual_scales
        self.num_runs.clear()
        self.has_started = True

    def enter(self, microbatch: int) -> None:
        """The forward passes that follow are of this micro-batch (0-based within the step)."""
        if self._mask is not None:
            self._row = self._mask.row(microbatch)

    def clear(self) -> None:
        self._mask = self._row = self._residual_scales = None

    def skips(self, layer: int) -> bool:
        """Whether to skip decoder layer ``layer``, 0-based over the whole model (not over a pipeline chunk)."""
        return self._row is not None and self._row[layer]

    def residual_scale(self, layer: int) -> float:
        """What a layer that runs multiplies its contribution to the residual stream by."""
        return 1.0 if self._residual_scales is None else self._residual_scales[layer]
