"""The ``validation`` section of a stage. Torch-free; which samples it comes to is in ``held_out``."""

from __future__ import annotations

from typing import Literal

from megatron_sts.config.section import PositiveInt, Section


class HeldOutConfig(Section):
    """Samples that are not trained on. Tokenizer, template and all else are those of the stage's ``data``."""

    source: Literal["llava_json", "energon"] | None = None
    """As of ``data``. None: the stage's."""
    path: str | None = None
    """As of ``data``, and nothing that training reads. Of an energon dataset its split ``val`` is taken, or ``train`` if it has no
    other. None: what the stage's own data hold out: the split ``val`` of its shards or blend; of scenes, other ones with other
    handwriting."""
    image_dir: str | None = None
    """As of ``data``."""


class ValidationConfig(Section):
    """A loss on held-out samples while the stage trains: that of the model as it will be used, so that all layers run and all visual
    tokens are seen, whatever LDS and VTC do. Training goes on as without it, to the last bit."""

    interval_steps: PositiveInt
    """Steps between validations; the stage's last step is followed by one too."""
    num_samples: PositiveInt | None = None
    """So many of the samples, drawn once: the same each time, in every run and layout. None: all. Scenes have no end, and need a
    number."""
    data: HeldOutConfig = HeldOutConfig()
    """Where the samples are."""
