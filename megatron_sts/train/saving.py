"""A checkpoint on its way to disk: agreed on by all ranks, written by each alone, put in place by the first."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import distributed as dist

from megatron_sts.config.run_folder import COMPLETE, DATA, STATE
from megatron_sts.mcore import checkpoint as mcore_checkpoint
from megatron_sts.mcore.writing import HostCopies, Written
from megatron_sts.runtime import integrity
from megatron_sts.runtime.dist import first_cause, is_rank_zero, on_rank_zero
from megatron_sts.runtime.integrity import digested
from megatron_sts.train.resume import PARTIAL_PREFIX, Progress
from megatron_sts.train.stage import Stage


@dataclass(frozen=True)
class _Done:
    """What a rank did of a checkpoint."""

    state: Written | None = None
    data: dict[str, str] | None = None
    """Digests of what it wrote of the place in the data."""
    cause: str | None = None
    """Why it could not write."""


class Saving:
    """One checkpoint. It appears under its name when it is whole, or not at all."""

    def __init__(self, folder: Path, stage: Stage, progress: Progress, copies: HostCopies | None) -> None:
        """Takes what is to be written, a collective: into ``copies``, or leaves it where it is until ``write``."""
        self.stage, self.progress, self.began = stage.spec.name, progress, time.monotonic()
        self.name = f"{stage.spec.index}-{stage.spec.name}-{progress.step:07d}"
        self.position = stage.spec.index, progress.step
        self._target, self._partial = folder / self.name, folder / f"{PARTIAL_PREFIX}{self.name}"
        self._done = _Done(cause=first_cause(self._make_folders() if is_rank_zero() else None))
        if self._done.cause is None:
            common = {"masks": stage.masks.state_dict() if stage.masks else None, "num_steps": stage.spec.num_steps}
            state = self._partial / STATE
            self._snapshot = mcore_checkpoint.snapshot(state, stage.chunks, stage.optimizer, common)
            if copies is not None:
                self._snapshot.copy(copies)
            self._place = _saved(stage.batches.place())
        self._writer: Thread | None = None
        self._crash: BaseException | None = None

    def _make_folders(self) -> str | None:
        try:
            shutil.rmtree(self._partial, ignore_errors=True)
            for folder in (STATE, DATA):
                (self._partial / folder).mkdir(parents=True)
        except OSError as error:
            return _reason(error)
        return None

    def write(self) -> None:
        """Writes this rank's files; no collective."""
        if self._done.cause is not None:
            return
        data = {}
        try:
            state = self._snapshot.write()
            for name, content in self._place.items():
                with digested(self._partial / DATA / name) as file:
                    file.write(content)
                data[name] = file.digest
            self._done = _Done(state, data)
        except OSError as error:
            self._done = _Done(cause=_reason(error))

    def start(self) -> None:
        """Writes in a thread, a daemon: a rank that fails ends although a disk blocks."""
        self._writer = Thread(target=self._write_apart, name="checkpoint", daemon=True)
        self._writer.start()

    def _write_apart(self) -> None:
        try:
            self.write()
        except BaseException as error:  # raised again by ``finish``
            self._crash = error

    @property
    def is_asynchronous(self) -> bool:
        """Whether it is, or was, written beside the training."""
        return self._writer is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank has not written all yet."""
        return self._writer is not None and self._writer.is_alive()

    def finish(self, make_room: Callable[[Path], None], timeout_s: float) -> str | None:
        """Puts the checkpoint in place once every rank has written; why it is not there, if it is not. A collective.

        ``make_room`` is called on rank 0 with the path where it is to appear; an OSError of it is a reason too.

        Raises:
            TimeoutError: the thread still writes after so long.
        """
        if self._writer is not None:
            self._writer.join(timeout_s)
            if self._writer.is_alive():
                raise TimeoutError(f"checkpoint {self.name} was not written within parallel.timeout_s={timeout_s:g}")
        if self._crash is not None:
            raise self._crash
        cause = first_cause(self._done.cause)
        if cause is None:
            done: list[_Done] | None = [_Done()] * dist.get_world_size() if is_rank_zero() else None
            dist.gather_object(self._done, done)
            if done is not None:
                try:
                    self._put_in_place(done, make_room)
                except OSError as error:
                    cause = _reason(error)
            cause = on_rank_zero(lambda: cause)
        if cause is not None and is_rank_zero():
            shutil.rmtree(self._partial, ignore_errors=True)
        return cause

    def _put_in_place(self, done: list[_Done], make_room: Callable[[Path], None]) -> None:
        states = [each.state for each in done if each.state is not None]
        digests = self._snapshot.finish([state.places for state in states])
        for state in states:
            digests |= state.digests
        digests = {f"{STATE}/{name}": digest for name, digest in digests.items()}
        for each in done:
            digests |= {f"{DATA}/{name}": digest for name, digest in (each.data or {}).items()}
        digests[COMPLETE] = integrity.write_text(self._partial / COMPLETE, json.dumps(asdict(self.progress)))
        integrity.write(self._partial, digests)
        for folder in (self._partial / STATE, self._partial / DATA, self._partial):
            integrity.sync(folder)
        make_room(self._target)
        self._partial.rename(self._target)
        integrity.sync(self._target.parent)


def _saved(place: tuple[str, dict[str, Any]] | None) -> dict[str, bytes]:
    """The file for a rank's place in the data, by name."""
    if place is None:
        return {}
    content = io.BytesIO()
    torch.save(place[1], content)
    return {place[0]: content.getvalue()}


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
