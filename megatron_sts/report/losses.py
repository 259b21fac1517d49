"""What loss a stage of a run came to. Knows no page and no figure."""

from __future__ import annotations

from statistics import fmean

from megatron_sts.report.run import Line, Run

NUM_LOSSES = 20
"""Logged steps at a stage's start, and at its end, whose mean loss is told."""


def _last_lines(run: Run, stage: str) -> list[Line]:
    return [line for line in run.steps[stage] if line["loss"] is not None][-NUM_LOSSES:]


def last_losses(run: Run, stage: str) -> list[float]:
    """A stage's last finite losses, ``NUM_LOSSES`` if there are so many."""
    return [line["loss"] for line in _last_lines(run, stage)]


def are_last_sparse(run: Run, stage: str) -> bool:
    """Whether tokens or layers were left out in a step of these, as at a stage's dense end they are not."""
    return any(line["flops_executed"] != line["flops_dense"] for line in _last_lines(run, stage))


def last_loss(run: Run, stage: str) -> float | None:
    """Their mean; None without any."""
    losses = last_losses(run, stage)
    return fmean(losses) if losses else None


def stage_losses(run: Run, stage: str) -> dict[str, float | None]:
    """``last_loss`` and, of a stage with validation, its last and its lowest one; None: not finite."""
    found = {"last_loss": last_loss(run, stage)}
    if stage in run.validations:
        losses = [line["loss"] for line in run.validations[stage]]
        finite = [loss for loss in losses if loss is not None]
        found |= {"last_validation_loss": losses[-1], "best_validation_loss": min(finite, default=None)}
    return found
