"""The ``logging`` section of a config: what is written while training. Torch-free."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_sts.config.section import PositiveInt, Section


class WandbConfig(Section):
    """A page on Weights & Biases; needs the extra ``wandb``."""

    project: str
    """Under which the page is filed."""
    entity: str | None = None
    """User or team. None: the key's own."""
    name: str | None = None
    """Of the page. None: that of the run's folder."""
    group: str | None = None
    """Of pages that belong together, as the seeds of one setting."""
    tags: tuple[str, ...] = ()
    """Words to find it by."""
    mode: Literal["online", "offline"] = "online"
    """offline: written into RUN_DIR/wandb, for ``wandb sync`` later. online: a key is taken from WANDB_API_KEY or ``wandb login``."""


class LoggingConfig(Section):
    """What is written while training."""

    interval_steps: PositiveInt = 1
    """Steps between lines of metrics.jsonl. Lines in between are not written."""
    ranks_interval_steps: PositiveInt = 100
    """Steps between ``ranks`` events of metrics.jsonl, and one at a stage's end: of every rank where the median seconds of a
    step went (report/README.md) and how fast it was; and which is slowest beside others that differ by samples alone."""
    slow_rank_share: Annotated[float, Field(gt=0)] = 0.2
    """By what share of their median a rank must be slower than those others for a warning on the terminal."""
    tensorboard: bool = True
    """Write RUN_DIR/tensorboard beside metrics.jsonl."""
    wandb: WandbConfig | None = None
    """Send the same numbers to Weights & Biases. None: do not."""
    device_peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """Peak of one device, for MFU. None: from the device table; unknown devices (CPU) and fp32 report null."""
