"""When and where checkpoints are written, which one a run goes on from, and what must agree. Tensors are mcore's business."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Thread

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.resolve import Resolved
from megatron_sts.config.run_folder import (
    COMPLETE,
    DATA,
    STATE,
    best_checkpoints,
    partial_checkpoints,
    position,
    set_aside,
    whole_checkpoints,
)
from megatron_sts.launch import trail
from megatron_sts.mcore import checkpoint as mcore_checkpoint
from megatron_sts.mcore.checkpoint import CheckpointError
from megatron_sts.mcore.writing import HostCopies
from megatron_sts.runtime import integrity
from megatron_sts.runtime.dist import first_cause, is_rank_zero, on_rank_zero
from megatron_sts.runtime.integrity import UnreadableError
from megatron_sts.train.metrics import RunLog
from megatron_sts.train.resume import (
    EVALUATION,
    PARTIAL_PREFIX,
    Progress,
    damage_of_progress,
    read_progress,
    remedy,
)
from megatron_sts.train.saving import Saving
from megatron_sts.train.stage import Stage
from megatron_sts.train.step import StepResult
from megatron_sts.train.suspects import Position, Suspects, set_aside_after


def advance(progress: Progress, result: StepResult, num_losses: int = 0) -> Progress:
    """Progress once a step is done, with the last ``num_losses`` losses."""
    row, since = progress.num_broken_updates, progress.broken_since
    if result.is_broken:
        row, since = row + 1, progress.step if since is None else since
    elif result.not_updated is None:
        row, since = 0, None
    losses = [*progress.recent_losses, *([result.loss] if num_losses and result.not_updated is None else [])]
    return replace(
        progress,
        step=progress.step + 1,
        validation_loss=None,
        num_samples=progress.num_samples + result.totals.num_samples,
        num_truncated_samples=progress.num_truncated_samples + result.totals.num_truncated_samples,
        num_skipped_samples=progress.num_skipped_samples + result.totals.num_skipped_samples,
        num_skipped_updates=progress.num_skipped_updates + (result.not_updated is not None),
        num_broken_updates=row,
        broken_since=since,
        recent_losses=losses[max(0, len(losses) - num_losses) :],
    )


class Checkpointer:
    """Saves into ``folder`` and restores from it."""

    def __init__(self, resolved: Resolved, folder: Path, log: RunLog, check: Callable[[], None] = lambda: None) -> None:
        """``check`` raises when the run has lost its folder to another start."""
        self._resolved, self._folder, self._log = resolved, folder, log
        self._settings = resolved.config.checkpoint
        self._check = check
        self._newest: Path | None = None
        self._copies = HostCopies()
        self._saving: Saving | None = None
        """The one that is written beside the training."""
        self._removal: Thread | None = None
        """Deletes the checkpoints that were forgotten last."""
        self._num_failures = 0
        """Saves in a row that could not be written."""
        self._equal_at: Position | None = None
        """Where ranks were last found equal before the newest save, if they compare and have since weights were loaded."""
        self._standstill_s = 0.0
        self.last_save_s = 0.0
        """How long the last one took, until it was whole; 0 before the first."""

    def is_due(self, step: int) -> bool:
        """Whether to save after ``step``."""
        interval = self._settings.interval_steps
        return interval is not None and (step + 1) % interval == 0

    def find(self) -> Progress:
        """Where the newest whole checkpoint stopped; the beginning without one. A collective: rank 0 says which there are.

        Folders that are not whole are in the way of those to come, and damaged checkpoints are no use: they are set aside, and
        named.

        Raises:
            CheckpointError: the newest is damaged, and ``strict``; or so is every one.
            ConfigError: a rank does not see it.
        """
        self._wait_for_removal()
        names = on_rank_zero(self._tidy_up)
        for number, name in enumerate(names, 1):
            checkpoint = self._folder / name
            damage = self._damage(checkpoint)
            if damage is None:
                self._newest = checkpoint
                self._check_best()
                return read_progress(checkpoint)
            if self._settings.strict or number == len(names):
                way = remedy(checkpoint, is_only=number == len(names))
                raise CheckpointError(f"checkpoint {name} cannot be read ({damage}); {way}")
            on_rank_zero(partial(self._set_aside, checkpoint, damage))
        return Progress()

    def _check_best(self) -> None:
        """Sets damaged ones of the best aside, so that they stand in no other's place; a collective."""
        if not self._settings.keep_best:
            return

        def best() -> list[str]:
            """And those of which nobody can tell."""
            whole = whole_checkpoints(self._folder)
            found = best_checkpoints(whole, self._settings.keep_best)
            found += [path for path in whole if damage_of_progress(path) is not None]
            return [path.name for path in found if path != self._newest]

        for name in on_rank_zero(best):
            if (damage := self._damage(self._folder / name)) is not None:
                on_rank_zero(partial(self._set_aside, self._folder / name, damage))

    def _tidy_up(self) -> list[str]:
        """Leaves whole checkpoints only; their names, newest first."""
        for folder in self._folder.glob(f"{PARTIAL_PREFIX}*"):  # a crash in the middle of a save
            self._log.say(f"removing {folder.name}: saving or deleting it was cut off")
            shutil.rmtree(folder, ignore_errors=True)
        for folder in partial_checkpoints(self._folder):
            self._set_aside(folder, f"it has no {COMPLETE}, so it is not whole")
        return [path.name for path in reversed(whole_checkpoints(self._folder))]

    def _damage(self, checkpoint: Path) -> str | None:
        """What is wrong with it, alike on every rank; a collective."""
        if unseen := first_cause(None if (checkpoint / COMPLETE).is_file() else "it is not there"):
            raise ConfigError(
                f"--run-dir={self._folder.parent}: not every rank sees checkpoint {checkpoint.name}, which rank 0 goes on from "
                f"({unseen}); give a folder that all nodes share"
            )
        try:
            return integrity.check(checkpoint) or first_cause(damage_of_progress(checkpoint))
        except UnreadableError as error:
            raise CheckpointError(f"checkpoint {checkpoint.name} cannot be looked at ({error})") from error

    def _set_aside(self, folder: Path, reason: str) -> None:
        try:
            aside = set_aside(folder)
        except OSError as error:
            raise ConfigError(
                f"checkpoint {folder.name}: {reason}, and cannot be renamed ({error.strerror}); move {folder} away"
            ) from error
        self._log.event("set_aside", checkpoint=folder.name, to=aside.name, reason=reason)
        self._log.warn(f"checkpoint {folder.name}: {reason}; set aside as {aside.name}")

    def has_before(self, progress: Progress) -> bool:
        """Whether the stage of ``progress`` has a checkpoint from before it; a collective."""
        before = range(1, progress.step)
        return on_rank_zero(
            lambda: any(
                stage == progress.stage and step in before
                for stage, step in map(position, whole_checkpoints(self._folder))
            )
        )

    def last_equal(self, stage: Stage) -> Position | None:
        """Where ranks were last found to hold the same since weights were loaded; None: they have not compared since."""
        equal_at = stage.replicas.equal_at
        return self._equal_at if equal_at is None else (stage.spec.index, equal_at)

    def distrust(self, last: Position, reason: str) -> Suspects:
        """Sets aside the checkpoints that stopped later than at ``last``, so that no start goes on from them; a collective. The
        save that is under way becomes none if it is of later."""
        if self._saving is not None and self._saving.position > last:
            self._saving = None  # its thread may write on: the next start, or save of that name, removes what it left
        with suppress(CheckpointError):  # that it could not be written is not what ends the run
            self.settle()

        def rename() -> Suspects:
            self._check()
            return set_aside_after(self._folder, last)

        found = on_rank_zero(rename)
        for name, aside in found.aside.items():
            self._log.event("set_aside", checkpoint=name, to=aside, reason=reason)
        return found

    def restore(self, stage: Stage, progress: Progress) -> Progress:
        """Loads the checkpoint that ``find`` found into ``stage`` if it was saved within it; a collective.

        Raises:
            CheckpointError: it cannot be read, or holds more than data.
            ConfigError: it was trained with other skip masks.
        """
        newest = self._newest
        if newest is None or progress.stage != stage.spec.index or progress.step == 0:
            return progress
        self._equal_at = None
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
            note = stage.batches.restore(newest / DATA, progress.step + progress.num_left_out)
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

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes a checkpoint beside the training."""
        return self._saving is not None and self._saving.is_writing

    def save(self, stage: Stage, progress: Progress, *, must: bool = False, wait: bool = False) -> None:
        """Writes a checkpoint once the last one is done, then forgets old ones; a collective. If it cannot be written (disk
        full), earlier ones stay. If it is ``asynchronous``, and nobody has to ``wait``, training goes on meanwhile, and
        ``settle`` ends it.

        Raises:
            CheckpointError: it cannot, and it ``must``, or it is the last of ``max_failures`` in a row.
        """
        trail.enter("save")
        self.settle()
        self._equal_at = self.last_equal(stage)
        with self._standing_still():
            if self._settings.asynchronous and not (must or wait):
                self._saving = Saving(self._folder, stage, progress, self._copies)
                self._saving.start()
                return
            self._copies.clear()
            saving = Saving(self._folder, stage, progress, None)
            saving.write()
            self._finish(saving, must=must)
            self._wait_for_removal()  # the run may end here

    def settle(self) -> None:
        """Ends the save that is under way, if there is one, waiting for it; a collective.

        Raises:
            CheckpointError: it could not be written, and is the last of ``max_failures`` in a row.
        """
        if self._saving is not None:
            trail.enter("save")
            saving, self._saving = self._saving, None
            with self._standing_still():
                self._finish(saving, must=False)

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._standstill_s += time.monotonic() - began

    def take_standstill_s(self) -> float:
        """How long training has stood still for checkpoints since the last call."""
        taken, self._standstill_s = self._standstill_s, 0.0
        return taken

    def _finish(self, saving: Saving, *, must: bool) -> None:
        cause = saving.finish(self._make_room, self._resolved.config.parallel.timeout_s)
        if cause is not None:
            self._fail(saving, cause, must=must)
            return
        self._num_failures = 0
        self.last_save_s = time.monotonic() - saving.began
        if is_rank_zero():
            self._forget_old(saving.progress, beside=saving.is_asynchronous)
            (self._folder.parent / EVALUATION).unlink(missing_ok=True)  # of other weights than these
        at = {"stage": saving.stage, "step": saving.progress.step}
        self._log.event("checkpoint", **at, checkpoint=saving.name, save_s=round(self.last_save_s, 6))

    def _make_room(self, target: Path) -> None:
        self._check()
        if target.exists():
            aside = set_aside(target)
            self._log.warn(f"{target.name} was there before it was written; set aside as {aside.name}")

    def _fail(self, saving: Saving, cause: str, *, must: bool) -> None:
        self._num_failures += 1
        whole = on_rank_zero(lambda: [path.name for path in whole_checkpoints(self._folder)])
        before = f", nor could the {self._num_failures - 1} before it" if self._num_failures > 1 else ""
        left = f"{whole[-1]} is intact" if whole else "there is no earlier one"
        line = f"checkpoint {saving.name} could not be written ({cause}){before}; {left}"
        self._log.event("checkpoint_failed", stage=saving.stage, step=saving.progress.step, cause=cause)
        limit = self._settings.max_failures
        if must or self._num_failures >= limit:
            way = "goes on from there" if whole else "starts from the beginning"
            raise CheckpointError(f"{line}, and the same command {way}")
        self._log.warn(
            f"{line}; training goes on, and stops if {limit - self._num_failures} more in a row cannot be written"
        )

    def _forget_old(self, progress: Progress, *, beside: bool) -> None:
        """``beside`` the training: large files take a while. What stays because the run fails meanwhile, the next start removes."""
        kept, every = self._before_broken(progress), self._settings.keep_every_steps
        whole = whole_checkpoints(self._folder)
        # If ranks turn out to differ, the run has to go on from there.
        staying = [path for path in whole if self._equal_at is not None and position(path) <= self._equal_at][-1:]
        staying += best_checkpoints(whole, self._settings.keep_best)
        found = [path for path in whole if path not in kept][: -self._settings.keep_last]
        old = [
            self._hidden(path) for path in found if path not in staying and (every is None or position(path)[1] % every)
        ]
        if beside:
            self._removal = Thread(target=_remove, args=(old,), name="removal", daemon=True)
            self._removal.start()
        else:
            _remove(old)

    def _hidden(self, checkpoint: Path) -> Path | None:
        """Its new name, under which it passes for none if a crash comes while it is deleted; None: it stays."""
        try:
            return checkpoint.rename(checkpoint.with_name(f"{PARTIAL_PREFIX}{checkpoint.name}"))
        except OSError as error:
            self._log.warn(f"old checkpoint {checkpoint.name} could not be deleted ({error.strerror})")
            return None

    def _wait_for_removal(self) -> None:
        if self._removal is not None:
            self._removal.join(self._resolved.config.parallel.timeout_s)

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


def _remove(folders: Iterable[Path | None]) -> None:
    for folder in folders:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
