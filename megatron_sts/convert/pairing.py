"""One weight of ours beside the Hugging Face tensors that it holds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_sts.config.architecture import ModelConfig, Part
from megatron_sts.convert.joining import Joining


@dataclass(frozen=True)
class Pairing:
    """One weight of ours and the Hugging Face tensors that it holds."""

    part: Part
    ours: str
    shape: tuple[int, ...]
    theirs: Mapping[str, tuple[int, ...]] = field(hash=False)
    """Names inside the part's own model, with shapes."""
    joining: Joining
    num_groups: int = 1
    optional: bool = False
    """Whether a model may lack it."""

    @property
    def num_elements(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


Sections = Mapping[Part, Any]
"""The sections of a config's ``model``, those that exist: a vision model alone has no language."""


def sections_of(model: ModelConfig) -> Sections:
    """All sections of a whole model."""
    return {part: getattr(model, part) for part in model.parts}
