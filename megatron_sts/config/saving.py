"""The ``checkpoint`` and ``guard`` sections of a config: what is saved when, and when a run stops or goes back. Torch-free."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from megatron_sts.config.section import NonNegativeInt, PositiveInt, Section


class CheckpointConfig(Section):
    """When to save. The end of a stage is always saved."""

    interval_steps: PositiveInt | None = None
    """None: at the end of each stage only."""
    keep_last: PositiveInt = 2
    """Newest checkpoints that stay; that of a stage's end goes like any other."""
    keep_every_steps: PositiveInt | None = None
    """Checkpoints after every so many steps of their stage stay too, for good. A multiple of ``interval_steps``."""
    keep_best: NonNegativeInt = 0
    """So many checkpoints of each stage with ``validation`` stay too: those with its lowest losses, NaN never. A multiple of
    the stage's ``validation.interval_steps`` is asked of ``interval_steps``, so that each checkpoint has the loss of its own
    weights. RUN_DIR/checkpoints/STAGE/best names the best one wherever a checkpoint is taken."""
    asynchronous: bool = False
    """Write while training goes on, from a copy in the host's memory as large as a rank's part of a checkpoint; training waits
    for that copy. The next save waits for the last one; the end of a stage and a stop are written as without it. What could not
    be written is told at the step that finds it.
    """
    max_failures: PositiveInt = 3
    """Saves in a row that may fail (a full disk): so many stop the run, fewer are a warning. A save that nothing follows, at
    the end of the run or of a stop that was asked for, stops it at once.
    """
    strict: bool = False
    """Whether a damaged newest checkpoint (files missing, cut short, changed) ends a start. Else it is set aside, as
    ``broken-NAME``, and the run goes on from the one before; without another one the start ends all the same. One that a later
    version of this package wrote is not damaged: a start is refused.
    """


class GuardConfig(Section):
    """When a run that does not learn stops, with exit status 1, or goes back."""

    max_broken_updates: PositiveInt = 10
    """Steps in a row whose update is not applied because loss or gradient is not finite; a stage's end that finds half of the
    stage so stops too. A step without any token to learn from is not updated either, but neither counts nor ends the row:
    unusable data have a limit of their own, ``data.max_bad_fraction``. Nothing is saved at the stop, and while the row lasts no
    checkpoint from before its first step is deleted.
    """
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A loss above so many times the median of the last ``spike_window_steps`` sends the run back to its stage's newest checkpoint,
    and on from there with the samples that follow those of the step with that loss. If it leaps again before the next save, that
    checkpoint is set aside as ``suspect-NAME``, and the run goes back to the one before, if the stage has one (``keep_last``,
    ``keep_every_steps``); else to the same again. Only losses whose update was applied count, and the window must be full. Needs
    ``checkpoint.interval_steps``, and data whose samples follow from a step's number (neither energon nor packed rows). None: never."""
    spike_window_steps: PositiveInt = 50
    """Of one stage: so many losses must be known before one can leap. Less than the longest stage's steps."""
    max_rollbacks: PositiveInt = 3
    """Ways back in a stage; one more leap stops the run."""
    checksum_interval_steps: PositiveInt | None = None
    """Steps between comparisons, bit for bit, of what ranks must hold alike, besides one in the first step of a start and in the
    last of a stage: weights, and without the distributed optimizer also
    reduced gradients and fp32 master weights, over data- and tensor-parallel ranks and tied embeddings. Ranks that
    differ end the run, named, with the tensor, and its checkpoints from after they were last the same are set aside as
    ``suspect-NAME``; the newest from before always stays, whatever ``checkpoint.keep_last`` is. Adam's moments are seen by what they
    do to weights, in the next comparison. None: never. One all-reduce of some bytes a tensor, and one pass over the memory.
    """
