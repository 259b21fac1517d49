"""When and where checkpoints are written, which one a run goes on from, and what must agree. Tensors are mcore's business."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from torch import distributed as dist

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.resolve import Resolved
from megatron_sts.mcore import checkpoint as mcore_checkpoint
from megatron_sts.runtime.dist import is_rank_zero
from megatron_sts.train.metrics import RunLog
from megatron_sts.train.stage import Stage
from megatron_sts.train.step import StepResult

COMPLETE = "progress.json"
"""Written last, into a folder that is then renamed: a folder with this name and file is whole."""
PARTIAL_PREFIX = ".partial-"


class CheckpointError(ValueError):
    """A checkpoint that could not be written; the ones before it are intact."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: the next step to run, and what its stage has counted so far."""

    stage: int = 0
    step: int = 0
    num_skipped_samples: int = 0
    num_skipped_updates: int = 0

    def after(self, result: StepResult) -> Progress:
        """Progress once a step is done."""
        return replace(
            self,
            step=self.step + 1,
            num_skipped_samples=self.num_skipped_samples + int(result.totals.num_skipped_samples),
            num_skipped_updates=self.num_skipped_updates + (not result.updated),
        )


class Checkpointer:
    """Saves into ``folder`` and restores from it. Data need no state of their own: a step's samples follow from its number."""

    def __init__(self, resolved: Resolved, folder: Path, log: RunLog) -> None:
        self._resolved, self._folder, self._log = resolved, folder, log
        self._settings = resolved.config.checkpoint

    def is_due(self, step: int) -> bool:
        """Whether to save after ``step``."""
        interval = self._settings.interval_steps
        return interval is not None and (step + 1) % interval == 0

    def find(self) -> Progress:
        """Where the newest whole checkpoint stopped; the beginning without one. Every rank reads the same folder."""
        newest = self._newest()
        return Progress(**json.loads((newest / COMPLETE).read_text())) if newest else Progress()

    def restore(self, stage: Stage, progress: Progress) -> Progress:
        """Loads the newest checkpoint into ``stage`` if it was saved within it; a collective."""
        newest = self._newest()
        if newest is None or progress.stage != stage.spec.index or progress.step == 0:
            return progress
        common = mcore_checkpoint.load(newest / "state", stage.chunks, stage.optimizer)
        if (stage.masks is None) != (common["masks"] is None):
            raise ConfigError(
                f"stages.{stage.spec.name}.lds: checkpoint {newest.name} was trained {'without' if stage.masks else 'with'} "
                "LDS; restore that setting or start the stage anew"
            )
        if stage.masks is not None:
            stage.masks.load_state_dict(common["masks"])
        self._log.event("resume", stage=stage.spec.name, step=progress.step, checkpoint=newest.name)
        return progress

    def save(self, stage: Stage, progress: Progress) -> None:
        """Writes a checkpoint, then forgets old ones; a collective.

        Raises:
            CheckpointError: it could not be written (disk full); earlier checkpoints stay.
        """
        name = f"{stage.spec.index}-{stage.spec.name}-{progress.step:07d}"
        partial = self._folder / f"{PARTIAL_PREFIX}{name}"
        if is_rank_zero():
            shutil.rmtree(partial, ignore_errors=True)
            (partial / "state").mkdir(parents=True)
        dist.barrier()
        common = {"masks": stage.masks.state_dict() if stage.masks else None}
        try:
            mcore_checkpoint.save(partial / "state", stage.chunks, stage.optimizer, common)
        except OSError as error:
            raise CheckpointError(
                f"checkpoint {name} could not be written: {error}; earlier ones are intact"
            ) from error
        dist.barrier()
        if is_rank_zero():
            (partial / COMPLETE).write_text(json.dumps(asdict(progress)))
            partial.rename(self._folder / name)
            self._forget_old()
        dist.barrier()
        self._log.event("checkpoint", stage=stage.spec.name, step=progress.step, checkpoint=name)

    def _whole(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        found = [path.parent for path in self._folder.glob(f"*/{COMPLETE}") if not path.parent.name.startswith(".")]
        return sorted(found, key=lambda path: (int(path.name.split("-", 1)[0]), int(path.name.rsplit("-", 1)[1])))

    def _newest(self) -> Path | None:
        return next(reversed(self._whole()), None)

    def _forget_old(self) -> None:
        for path in self._whole()[: -self._settings.keep_last]:
            shutil.rmtree(path)
