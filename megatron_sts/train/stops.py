"""When a run stops by itself: samples that cannot be used, updates that are not applied. The same on every rank; torch-free."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_sts.config.resolve import ResolvedStage
from megatron_sts.data.records import BadSampleError
from megatron_sts.train.resume import Progress

if TYPE_CHECKING:
    from megatron_sts.train.metrics import RunLog

BAD_SAMPLES_GRACE = 100
"""Samples before the share of skipped ones is judged within a stage."""


class NotUpdatedError(ValueError):
    """The model does not learn: its updates are not applied."""


def bad_samples(spec: ResolvedStage, progress: Progress) -> str | None:
    """Why the stage's data are mostly unusable, if they are: judged once there were enough samples, and at its end.

    The share of skipped samples is above ``data.max_bad_fraction``, or a whole stage used none.
    """
    num_skipped, is_over = progress.num_skipped_samples, progress.step == spec.num_steps
    num_samples = progress.num_samples + num_skipped
    if is_over and progress.num_samples == 0:
        return f"stage {spec.name}: none of its {num_samples} samples could be used; the warnings above say why"
    if not is_over and num_samples < BAD_SAMPLES_GRACE:
        return None
    if num_skipped > spec.data.max_bad_fraction * num_samples:
        here = "the stage's end" if is_over else f"step {progress.step}"
        way = "delete the stage's last checkpoint" if is_over else "mend the data"
        return (
            f"stage {spec.name}: {num_skipped} of {num_samples} samples could not be used, more than "
            f"data.max_bad_fraction={spec.data.max_bad_fraction:g}; the warnings above say why; saved at {here}: {way} or "
            "raise the limit, and the same command goes on"
        )
    return None


def going_on(spec: ResolvedStage, progress: Progress, log: RunLog) -> Progress:
    """From where a stage goes on that may have stopped on bad samples: they are mended or accepted, and counted anew.

    Raises:
        BadSampleError: it had stopped at its end, where nothing is left to be done better, and its data are not accepted yet.
    """
    if not progress.stopped_on_bad_samples:
        return progress
    if progress.step == spec.num_steps and (unusable := bad_samples(spec, progress)):
        raise BadSampleError(unusable)
    log.say(f"stage {spec.name} had stopped on bad samples; from here on they are counted anew")
    return replace(
        progress, num_samples=0, num_truncated_samples=0, num_skipped_samples=0, stopped_on_bad_samples=False
    )


def broken_updates(spec: ResolvedStage, progress: Progress, limit: int) -> str | None:
    """Why the stage's updates are given up, if they are: too many in a row were not finite, or none was applied at all.

    Too many are ``limit``, and at the stage's end half of the stage: a short one must not pass for trained.
    """
    is_over, row = progress.step == spec.num_steps, progress.num_broken_updates
    if row >= limit or (is_over and 2 * row >= spec.num_steps):
        return (
            f"stage {spec.name}: {row} updates in a row were not applied, the first at step {progress.broken_since}, because "
            f"loss or gradient was not finite (guard.max_broken_updates={limit}); lower stages.{spec.name}.optimizer.lr, or "
            "look at that step's data"
        )
    if is_over and progress.num_skipped_updates == spec.num_steps:
        return f"stage {spec.name}: none of its {spec.num_steps} steps had a token to learn from; look at its answers"
    return None
