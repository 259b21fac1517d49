"""The micro-batches of each step: one rank of a model copy reads them ahead, and its other ranks get them from it."""

from __future__ import annotations

import pickle
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.cost.balance import Balanced
from megatron_sts.data.batch import Batch
from megatron_sts.mcore import groups
from megatron_sts.mcore.groups import Place
from megatron_sts.runtime.device import current_device
from megatron_sts.runtime.dist import broadcast_object
from megatron_sts.runtime.plain import PlainDataError
from megatron_sts.train.agreement import check_shapes
from megatron_sts.train.ahead import Ahead
from megatron_sts.train.feed import Fed, Feed
from megatron_sts.train.resume import check_same_copies


class StageBatches:
    """The micro-batches of a stage's steps on this rank.

    The first rank of each model copy reads, so that a copy's ranks can never see different samples, whatever their
    files, libraries or pictures do; it prepares the next step in a thread while this one computes.
    """

    def __init__(self, resolved: Resolved, stage: ResolvedStage, place: Place) -> None:
        self._stage, self._place, self._timeout_s = stage, place, resolved.config.parallel.timeout_s
        self._first_stage_sees_pixels = resolved.first_stage_sees_pixels(stage)
        self._feed = Feed(resolved, stage, place) if place.is_first_of_copy else None
        self._reader = None if self._feed is None else Ahead(self._feed.step, "feed")
        self._next: tuple[int, Future[Fed]] | None = None
        self._state: dict[str, Any] | None = None
        self.balanced: Balanced | None = None
        """With ``batch.balance``, on a rank that reads: who got what in the last step."""
        self.wait_s = 0.0
        """How long this rank's last step waited for its samples to be read; what others wait for it is not in it."""

    def step(self, step: int) -> list[Batch]:
        """The step's micro-batches for this model copy, on the host; a collective of its ranks.

        Raises:
            DisagreementError: this rank has others than the step should have.
        """
        batches = None
        if self._reader is not None:
            fed = self._take(step, self._reader)
            self._state, batches, self.balanced = fed.state, fed.batches, fed.balanced
        shared = share(batches, self._place, first_stage_sees_pixels=self._first_stage_sees_pixels)
        check_shapes(self._stage, step, shared)
        return shared

    def _take(self, step: int, reader: Ahead[Fed]) -> Fed:
        planned, future = self._next or (step, reader.submit(step))
        assert planned == step, f"step {planned} was read ahead, but {step} is asked for"
        started = time.perf_counter()
        try:
            fed, self._next = future.result(self._timeout_s), None
        except TimeoutError as error:
            raise TimeoutError(f"step {step} was not read within parallel.timeout_s={self._timeout_s:g}") from error
        self.wait_s = time.perf_counter() - started
        if step + 1 < self._stage.num_steps:
            self._next = step + 1, reader.submit(step + 1)
        return fed

    def place(self) -> tuple[str, dict[str, Any]] | None:
        """Where this rank's reading goes on after the last step taken, and the name of the file for it; None: it reads
        nothing. ``restore`` takes it, as torch saves it.
        """
        if self._feed is None:
            return None
        return f"{self._place.dp_rank}.pt", {"dp_size": self._place.dp_size, **(self._state or {})}

    def restore(self, folder: Path, step: int) -> str | None:
        """Goes on before the samples of ``step``, at the ``place`` that was written into ``folder``; what a user should know of it, if anything.

        Raises:
            ConfigError: the reading depends on the number of data-parallel ranks, and that has changed.
        """
        # Every rank looks, so that all of them refuse, with one line.
        if self._stage.is_seekable:
            if self._feed is not None:
                self._feed.seek(step)
            return None
        saved = _read(folder / "0.pt")["dp_size"]
        check_same_copies(self._stage, folder.parent, saved, self._place.dp_size)
        if self._feed is None:
            return None
        state = _read(folder / f"{self._place.dp_rank}.pt")
        note = self._feed.load_state_dict(state)
        self._state = state
        return note

    def close(self) -> None:
        """Stops reading ahead."""
        if self._reader is not None and self._feed is not None:
            self._reader.close(self._timeout_s)
            self._feed.close()


def _read(file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise PlainDataError(f"{file} holds more than data, or is damaged; none of it was run") from error
    return state


def share(batches: list[Batch] | None, place: Place, *, first_stage_sees_pixels: bool = True) -> list[Batch]:
    """The first rank's micro-batches on every rank of the model copy, pixels on those of the first stage, or where these need
    none on the first rank alone; a collective."""
    if place.tp_size * place.cp_size * place.pp_size == 1:
        assert batches is not None
        return batches
    pixels = [batch.pixels for batch in batches or []]
    header = None
    if batches is not None:
        shapes = [None if image is None else tuple(image.shape) for image in pixels]
        header = [replace(batch, pixels=None) for batch in batches], shapes
    if place.cp_size > 1 and place.is_first_stage and place.tp_rank == 0:
        header = broadcast_object(header, groups.context_parallel_group())
    bare, shapes = broadcast_object(header, groups.model_parallel_group())
    if not (place.is_first_stage and first_stage_sees_pixels):
        return list(bare) if batches is None else batches
    if place.tp_size * place.cp_size > 1:
        pixels = [share_pixels(number, pixels, shape) for number, shape in enumerate(shapes)]
    return [replace(batch, pixels=image) for batch, image in zip(bare, pixels, strict=True)]


def share_pixels(
    number: int, pixels: Sequence[torch.Tensor | None], shape: tuple[int, ...] | None
) -> torch.Tensor | None:
    """Micro-batch ``number``'s pixels of this ``shape`` on all tensor- and context-parallel ranks, from the first one, which has ``pixels``;
    a collective. None where there are none."""
    if shape is None:
        return None
    mine, device = pixels[number] if pixels else None, current_device().torch_device
    tensor = torch.empty(shape, dtype=torch.uint8, device=device) if mine is None else mine.to(device)
    group = groups.row_group()
    dist.broadcast(tensor, src=dist.get_global_rank(group, 0), group=group)
    return tensor
