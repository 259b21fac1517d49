"""A loss that leaps: the run goes back to its newest checkpoint, and on from there without the data that led to the leap.

If it leaps again before it has saved anew, that checkpoint may hold the cause: it is set aside, and the run goes back to the one
before. The same on every rank: losses are, and so is what checkpoints say. What is decided follows from the checkpoints alone, so
that a run that dies on the way back decides the same when it is started again.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from megatron_sts.config.saving import GuardConfig
from megatron_sts.train.checkpoint import Checkpointer
from megatron_sts.train.metrics import RunLog
from megatron_sts.train.resume import Progress
from megatron_sts.train.stage import Stage


class SpikeError(ValueError):
    """Losses leap again and again."""


def num_losses_kept(guard: GuardConfig) -> int:
    """How many losses a run has to remember: a window, and the one that is compared with it."""
    return 0 if guard.spike_factor is None else guard.spike_window_steps + 1


def usual_loss(guard: GuardConfig, progress: Progress) -> float | None:
    """What the loss of the step that ``progress`` ends with is compared with, if it is a leap beside it: the median of the losses
    before. None: it is no leap, or too few losses are known."""
    *before, loss = progress.recent_losses or [0.0]
    if guard.spike_factor is None or len(before) < guard.spike_window_steps:
        return None
    usual = median(before)
    return usual if loss > guard.spike_factor * usual > 0 else None  # beside a loss of 0 any other would be a leap


def way_back(stage: Stage, checkpointer: Checkpointer, progress: Progress, log: RunLog) -> Progress | None:
    """From where the stage is to be trained again, without the samples of the steps up to here; None: it goes on. Called after every
    update that was applied; a collective if it was a leap.

    Raises:
        SpikeError: it is one more than ``guard.max_rollbacks``.
    """
    spec, guard = stage.spec, stage.resolved.config.guard
    usual = usual_loss(guard, progress)
    if usual is None:
        return None
    step, loss = progress.step - 1, progress.recent_losses[-1]
    line = f"stage {spec.name}, step {step}: loss {loss:.4g} is {loss / usual:.3g} times the median {usual:.4g} of the last {guard.spike_window_steps} steps"
    checkpointer.settle()
    if progress.num_rollbacks >= guard.max_rollbacks:
        raise SpikeError(
            f"{line} (guard.spike_factor={guard.spike_factor:g}), after {progress.num_rollbacks} ways back "
            f"(guard.max_rollbacks); lower stages.{spec.name}.optimizer.lr, or look at that step's data"
        )
    found, suspects = checkpoint_to_trust(stage, checkpointer, progress)
    aside = "".join(f"; it had gone back to {name} before, which is set aside as {to}" for name, to in suspects.items())
    details = {"stage": spec.name, "step": step, "loss": loss, "usual_loss": usual}
    if found.stage != spec.index or found.step == 0:
        log.event("spike", **details, to_step=None, skipped_steps=0)
        log.warn(f"{line}{aside}; it goes on, as the stage has no checkpoint yet to go back to")
        return None
    num_skipped = progress.step + progress.num_left_out - found.step
    log.event("spike", **details, to_step=found.step, skipped_steps=progress.step - found.step)
    log.warn(f"{line}{aside}; back to step {found.step}, and on with the samples that follow")
    return replace(found, num_rollbacks=progress.num_rollbacks + 1, num_left_out=num_skipped)


def checkpoint_to_trust(
    stage: Stage, checkpointer: Checkpointer, progress: Progress
) -> tuple[Progress, dict[str, str]]:
    """The checkpoint to go back to: the newest, or the one before if the run had gone back to the newest already; a collective.

    Returns:
        Where it stopped, and the new name of the one that was set aside for it, by its old name.
    """
    found = checkpointer.find()
    # A checkpoint that was saved since the last way back knows of that one.
    has_gone_there = found.stage == stage.spec.index and found.step > 0 and found.num_rollbacks < progress.num_rollbacks
    if not has_gone_there or not checkpointer.has_before(found):
        return found, {}
    why = "the loss leapt again after the run had gone back to it"
    suspects = checkpointer.distrust((found.stage, found.step - 1), why)
    return (checkpointer.find() if suspects.aside else found), suspects.aside
