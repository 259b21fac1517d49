"""When and where checkpoints are written, which one a run goes on from, and what must agree. Tensors are mcore's business."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from torch import distributed as dist

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.resolve import Resolved
from megatron_sts.config.run_folder import (
    COMPLETE,
    STATE,
    partial_checkpoints,
    position,
    set_aside,
    whole_checkpoints,
)
from megatron_sts.mcore import checkpoint as mcore_checkpoint
from megatron_sts.mcore.checkpoint import CheckpointError
from megatron_sts.runtime.dist import is_rank_zero, on_rank_zero
from megatron_sts.train.metrics import RunLog
from megatron_sts.train.resume import (
    EVALUATION,
    PARTIAL_PREFIX,
    Progress,
    read_progress,
    remedy,
)
from megatron_sts.train.stage import Stage
from megatron_sts.train.step import StepResult


def advance(progress: Progress, result: StepResult) -> Progress:
    """Progress once a step is done."""
    row, since = progress.num_broken_updates, progress.broken_since
    if result.is_broken:
        row, since = row + 1, progress.step if since is None else since
    elif result.not_updated is None:
        row, since = 0, None
    return replace(
        progress,
        step=progress.step + 1,
        num_samples=progress.num_samples + result.totals.num_samples,
        num_truncated_samples=progress.num_truncated_samples + result.totals.num_truncated_samples,
        num_skipped_samples=progress.num_skipped_samples + result.totals.num_skipped_samples,
        num_skipped_updates=progress.num_skipped_updates + (result.not_updated is not None),
        num_broken_updates=row,
        broken_since=since,
    )


class Checkpointer:
    """Saves into ``folder`` and restores from it."""

    def __init__(self, resolved: Resolved, folder: Path, log: RunLog) -> None:
        self._resolved, self._folder, self._log = resolved, folder, log
        self._settings = resolved.config.checkpoint
        self._newest: Path | None = None

    def is_due(self, step: int) -> bool:
        """Whether to save after ``step``."""
        interval = self._settings.interval_steps
        return interval is not None and (step + 1) % interval == 0

    def find(self) -> Progress:
        """Where the newest whole checkpoint stopped; the beginning without one. A collective: rank 0 says which.

        Folders that are not whole are in the way of those to come: they are set aside, and named.

        Raises:
            ConfigError: this rank does not see it.
        """
        name = on_rank_zero(self._tidy_up)
        if name is None:
            return Progress()
        self._newest = self._folder / name
        if not (self._newest / COMPLETE).is_file():
            raise ConfigError(
                f"--run-dir={self._folder.parent}: this rank does not see checkpoint {name}, which rank 0 goes on from; "
                "give a folder that all nodes share"
            )
        return read_progress(self._newest)

    def _tidy_up(self) -> str | None:
        """Leaves whole checkpoints only; the newest one's name."""
        for partial in self._folder.glob(f"{PARTIAL_PREFIX}*"):  # a crash in the middle of a save
            shutil.rmtree(partial, ignore_errors=True)
        for folder in partial_checkpoints(self._folder):
            self._set_aside(folder, f"it has no {COMPLETE}, so it is not whole")
        return next((path.name for path in whole_checkpoints(self._folder)[-1:]), None)

    def _set_aside(self, folder: Path, reason: str) -> None:
        try:
            aside = set_aside(folder)
        except OSError as error:
            raise ConfigError(
                f"checkpoint {folder.name}: {reason}, and cannot be renamed ({error.strerror}); move {folder} away"
            ) from error
        self._log.event("set_aside", checkpoint=folder.name, to=aside.name, reason=reason)
        self._log.warn(f"checkpoint {folder.name}: {reason}; set aside as {aside.name}")

    def restore(self, stage: Stage, progress: Progress) -> Progress:
        """Loads the checkpoint that ``find`` found into ``stage`` if it was saved within it; a collective.

        Raises:
            CheckpointError: it is damaged.
            ConfigError: it was trained with other skip masks.
        """
        newest = self._newest
        if newest is None or progress.stage != stage.spec.index or progress.step == 0:
            return progress
        try:
            common = mcore_checkpoint.load(newest / STATE, stage.chunks, stage.optimizer)
        except CheckpointError as error:
            raise CheckpointError(f"checkpoint {newest.name} cannot be read ({error}); {remedy(newest)}") from error
        if (stage.masks is None) != (common["masks"] is None):
            raise ConfigError(
                f"stages.{stage.spec.name}.lds: checkpoint {newest.name} was trained {'without' if stage.masks else 'with'} "
                "LDS; restore that setting or start the stage anew"
            )
        if stage.masks is not None:
            stage.masks.load_state_dict(common["masks"])
        note = None
        if progress.step < stage.spec.num_steps:  # else there is nothing left to read, whatever the layout
            note = stage.batches.restore(newest / "data", progress.step)
        self._log.event("resume", stage=stage.spec.name, step=progress.step, checkpoint=newest.name)
        self._log.say(f"going on from checkpoint {newest.name}")
        if note is not None:
            self._log.say(note)
        before = common.get("num_steps", stage.spec.num_steps)  # none in checkpoints of earlier versions
        if before != stage.spec.num_steps:
            self._tell_extension(stage, before, common["lr"])
        return progress

    def _tell_extension(self, stage: Stage, before: int, lr_before: float) -> None:
        spec, lr = stage.spec, stage.optimizer.lr
        steps = {"num_steps_before": before, "num_steps": spec.num_steps}
        self._log.event("extend", stage=spec.name, **steps, lr_before=lr_before, lr=lr)
        self._log.say(
            f"stage {spec.name} now has {spec.num_steps} steps instead of {before}, its schedules are planned anew: the next "
            f"learning rate is {lr:.3g} instead of {lr_before:.3g}"
        )

    def save(self, stage: Stage, progress: Progress) -> None:
        """Writes a checkpoint, then forgets old ones; a collective.

        Raises:
            CheckpointError: it could not be written (disk full); earlier checkpoints stay.
        """
        name = f"{stage.spec.index}-{stage.spec.name}-{progress.step:07d}"
        try:
            self._write(name, stage, progress)
        except (CheckpointError, OSError) as error:
            if is_rank_zero():
                shutil.rmtree(self._folder / f"{PARTIAL_PREFIX}{name}", ignore_errors=True)
            raise CheckpointError(
                f"checkpoint {name} could not be written ({error}); earlier ones are intact, and the same command goes on "
                "from the last of them"
            ) from error
        self._log.event("checkpoint", stage=stage.spec.name, step=progress.step, checkpoint=name)

    def _write(self, name: str, stage: Stage, progress: Progress) -> None:
        partial = self._folder / f"{PARTIAL_PREFIX}{name}"
        if is_rank_zero():
            shutil.rmtree(partial, ignore_errors=True)
            (partial / STATE).mkdir(parents=True)
        dist.barrier()
        stage.batches.save(partial / "data")
        common = {"masks": stage.masks.state_dict() if stage.masks else None, "num_steps": stage.spec.num_steps}
        mcore_checkpoint.save(partial / STATE, stage.chunks, stage.optimizer, common)
        if is_rank_zero():
            (partial / COMPLETE).write_text(json.dumps(asdict(progress)), encoding="utf-8")
            if (self._folder / name).exists():
                self._set_aside(self._folder / name, "it is in the way of the one that is written now")
            partial.rename(self._folder / name)
            self._forget_old(progress)
            (self._folder.parent / EVALUATION).unlink(missing_ok=True)  # of other weights than these
        dist.barrier()

    def _forget_old(self, progress: Progress) -> None:
        kept = self._before_broken(progress)
        found = [path for path in whole_checkpoints(self._folder) if path not in kept]
        for path in found[: -self._settings.keep_last]:
            shutil.rmtree(path)

    def _before_broken(self, progress: Progress) -> list[Path]:
        """Checkpoints from before the row of broken updates that ``progress`` is in: the newest may be what broke them."""
        if progress.broken_since is None:
            return []
        since = (progress.stage, progress.broken_since)
        return [path for path in whole_checkpoints(self._folder) if position(path) <= since]

    def way_back(self, progress: Progress) -> str:
        """How to go on from before the broken updates that ``progress`` is in, in words."""
        kept = self._before_broken(progress)
        return f"the newest checkpoint from before is {kept[-1].name}" if kept else "no checkpoint is from before"
