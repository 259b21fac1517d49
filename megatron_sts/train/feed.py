"""Reads the samples of a data-parallel rank and makes each step's micro-batches of them. No collectives here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.schema import DataConfig
from megatron_sts.config.tokens import TokenCounts, round_up
from megatron_sts.cost.balance import Balanced, Balancer
from megatron_sts.cost.flops import TokenLoad
from megatron_sts.data.batch import Batch
from megatron_sts.data.collate import PreparedSample, Row
from megatron_sts.data.llava_json import LlavaJsonSource
from megatron_sts.data.records import (
    BadSampleError,
    Clip,
    ImageSource,
    Record,
    RecordSource,
    SkippedSample,
    Turn,
    Views,
)
from megatron_sts.data.scenes.source import ScenesSource, Split
from megatron_sts.mcore.groups import Place
from megatron_sts.model.prepare import BatchPreparer
from megatron_sts.vision.tower import fitting_of

Sample = tuple[int, Record | SkippedSample]
"""A record with a number of its own."""
MAX_SKIPPED = 100
"""Samples that packing skips in a step before it leaves room in the rows: else data without a usable sample would be read for ever."""


class Stream(Protocol):
    """The samples of one data-parallel rank."""

    @property
    def is_over(self) -> bool:
        """Whether none is left. What is trained on has no end."""
        ...

    def __next__(self) -> Sample: ...

    def keep(self, sample: Sample) -> Any:
        """A sample as plain values for a checkpoint."""
        ...

    def again(self, kept: Any) -> Sample:
        """The sample that ``keep`` was given."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """What a user should know of how it goes on, if anything."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Fed:
    """A step's micro-batches, and where reading goes on after them."""

    batches: list[Batch]
    state: dict[str, Any]
    is_last: bool = False
    """Nothing is left to be read, nor in no row yet."""
    balanced: Balanced | None = None
    """With ``batch.balance``, who got what."""


class IndexedStream:
    """A data-parallel rank's part of an indexable source: in every global batch, its own micro-batches."""

    def __init__(self, source: RecordSource, stage: ResolvedStage, place: Place) -> None:
        self._source, self._batch, self._place = source, stage.config.batch, place
        self._num_read = 0

    @property
    def is_over(self) -> bool:
        return False

    @property
    def next_index(self) -> int:
        """Of the source."""
        micro, row = divmod(self._num_read, self._batch.micro_batch_size)
        return (micro * self._place.dp_size + self._place.dp_rank) * self._batch.micro_batch_size + row

    def __next__(self) -> Sample:
        index = self.next_index
        self._num_read += 1
        return self.again(index)

    def global_batch(self) -> list[Sample]:
        """All ranks' samples of the step that begins here, which are then read."""
        start = self._num_read * self._place.dp_size
        self._num_read += self._batch.global_batch_size // self._place.dp_size
        return [self.again(index) for index in range(start, start + self._batch.global_batch_size)]

    def keep(self, sample: Sample) -> int:
        return sample[0]

    def again(self, kept: int) -> Sample:
        try:
            return kept, self._source[kept]
        except BadSampleError as error:
            return kept, SkippedSample(error.key or f"number {kept}", str(error))

    def state_dict(self) -> dict[str, Any]:
        return {"num_read": self._num_read}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_read = state["num_read"]

    def close(self) -> None:
        pass


class PreparedStream:
    """A data-parallel rank's part of a prepared dataset, in the order in which Energon reads it."""

    is_over = False

    def __init__(self, resolved: Resolved, stage: ResolvedStage, place: Place) -> None:
        from megatron_sts.data.energon import EnergonStream  # a second

        data, vision = stage.data, resolved.config.model.vision
        assert data.path is not None
        self._stream = EnergonStream(
            Path(data.path),
            seed=resolved.config.seed + stage.index,
            dp_rank=place.dp_rank,
            dp_size=place.dp_size,
            num_workers=data.num_workers,
            shuffle_buffer_size=data.shuffle_buffer_size,
            fitting=fitting_of(vision) if vision else None,
        )
        self._place, self._num_read = place, 0

    def __next__(self) -> Sample:
        self._num_read += 1
        return self._num_read * self._place.dp_size + self._place.dp_rank, next(self._stream)

    def keep(self, sample: Sample) -> dict[str, Any]:
        index, record = sample
        assert isinstance(record, Record)
        turns = [[turn.role, turn.text] for turn in record.turns]
        images = [_plain(decode()) for decode in record.images]
        return {"index": index, "key": record.key, "turns": turns, "images": images}

    def again(self, kept: dict[str, Any]) -> Sample:
        turns = tuple(Turn(role, text) for role, text in kept["turns"])
        return kept["index"], Record(kept["key"], turns, tuple(map(_source, kept["images"])))

    def state_dict(self) -> dict[str, Any]:
        return {"num_read": self._num_read, "energon": self._stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        self._num_read = state["num_read"]
        return self._stream.load_state_dict(state["energon"])

    def close(self) -> None:
        self._stream.close()


def _plain(image: np.ndarray | Clip | Views) -> Any:
    """As tensors and values."""
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image)
    if isinstance(image, Clip):
        return {"frames": [torch.from_numpy(frame) for frame in image.frames]}
    return {**vars(image), "pixels": torch.from_numpy(image.pixels)}


def _source(kept: Any) -> ImageSource:
    """The inverse of ``_plain``."""
    if isinstance(kept, torch.Tensor):
        return kept.numpy
    if "frames" in kept:
        clip = Clip(tuple(frame.numpy() for frame in kept["frames"]))
        return lambda: clip
    views = Views(**{**kept, "pixels": kept["pixels"].numpy()})
    return lambda: views


class Feed:
    """Turns a stream into steps of ``num_microbatches`` micro-batches."""

    def __init__(self, resolved: Resolved, stage: ResolvedStage, place: Place, stream: Stream | None = None) -> None:
        """``stream``: None: that of the stage's data."""
        self._stage = stage
        self._stream = open_stream(resolved, stage, place) if stream is None else stream
        self._preparer = BatchPreparer(resolved, stage, needs_pixels=resolved.config.model.vision is not None)
        is_balanced = stage.config.batch.balance == "cost" and stream is None
        self._balancer, self._dp_rank = Balancer(resolved, stage) if is_balanced else None, place.dp_rank
        self._pending: list[Sample] = []
        """Read, but not in a row yet (packing)."""

    def step(self, step: int) -> Fed:
        """Reads and prepares a step."""
        counts, batch = self._stage.tokens(step), self._stage.config.batch
        num_rows = self._stage.num_microbatches * batch.micro_batch_size
        skipped: list[SkippedSample] = []
        read = self._packed_rows if batch.packing == "pack" else self._single_rows
        balanced = None
        if self._balancer is None:
            rows = read(num_rows, counts, skipped)
        else:
            samples, balanced = self._balanced(self._balancer, counts)
            rows = self._rows_of(samples, counts, skipped)
        micros = [rows[start : start + batch.micro_batch_size] for start in range(0, num_rows, batch.micro_batch_size)]
        together = [rows] * len(micros) if self._balancer is None else micros
        batches = [
            self._preparer.collate(micro, counts, longest=self._longest(those) if batch.packing == "none" else None)
            for micro, those in zip(micros, together, strict=True)
        ]
        batches = [replace(batch, number=number) for number, batch in enumerate(batches)]
        batches[0] = replace(batches[0], skipped=tuple(skipped))
        is_last = self._stream.is_over and not self._pending
        return Fed(batches, self.state_dict(), is_last=is_last, balanced=balanced)

    def state_dict(self) -> dict[str, Any]:
        """Where reading goes on: the stream's own state, and what is pending; plain values."""
        return {"stream": self._stream.state_dict(), "pending": [self._stream.keep(each) for each in self._pending]}

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Goes on where the feed with this state stood; what a user should know of it, if anything."""
        note = self._stream.load_state_dict(state["stream"])
        self._pending = [self._stream.again(kept) for kept in state["pending"]]
        return note

    def seek(self, step: int) -> None:
        """Goes on before ``step`` without a state, whatever the number of data-parallel ranks was; see ``is_seekable``."""
        num_read = step * self._stage.num_microbatches * self._stage.config.batch.micro_batch_size
        self._stream.load_state_dict({"num_read": num_read})

    def close(self) -> None:
        """Stops what reads in the background."""
        self._stream.close()

    def _longest(self, rows: Sequence[Row]) -> int:
        """Tokens of rows that are as long as their longest sample."""
        return round_up(max([sample.length for row in rows for sample in row] or [1]), self._stage.token_multiple)

    def _balanced(self, balancer: Balancer, counts: TokenCounts) -> tuple[list[Sample], Balanced]:
        """This rank's samples, micro-batch by micro-batch, and who got what.

        Every rank deals out the whole global batch by itself, from what can be told of its samples without their pictures.
        """
        assert isinstance(self._stream, IndexedStream)
        samples = self._stream.global_batch()
        loads = [
            self._preparer.load(record, counts) if isinstance(record, Record) else TokenLoad() for _, record in samples
        ]
        found = balancer.balance(loads, counts.sequence_length)
        return [samples[number] for micro in found.deal[self._dp_rank] for number in micro], found

    def _next(self) -> Sample | None:
        """None behind the last sample."""
        return None if self._stream.is_over else next(self._stream)

    def _prepared(self, sample: Sample, counts: TokenCounts, skipped: list[SkippedSample]) -> PreparedSample | None:
        """None for what cannot be used; ``skipped`` then says why."""
        index, record = sample
        try:
            if isinstance(record, Record):
                return self._preparer.prepare(index, record, counts)
            skipped.append(record)
        except BadSampleError as error:
            assert isinstance(record, Record)
            skipped.append(SkippedSample(record.key, str(error)))
        return None

    def _single_rows(self, num_rows: int, counts: TokenCounts, skipped: list[SkippedSample]) -> list[Row]:
        """A sample a row; what cannot be used leaves its row empty, so that a sample's place never depends on others."""
        return self._rows_of((self._next() for _ in range(num_rows)), counts, skipped)

    def _rows_of(self, read: Iterable[Sample | None], counts: TokenCounts, skipped: list[SkippedSample]) -> list[Row]:
        samples = (None if sample is None else self._prepared(sample, counts, skipped) for sample in read)
        return [[] if sample is None else [sample] for sample in samples]

    def _packed_rows(self, num_rows: int, counts: TokenCounts, skipped: list[SkippedSample]) -> list[Row]:
        """Reads until the step's rows are full by length, fills them, and keeps what did not fit for the next step."""
        read: list[tuple[Sample, PreparedSample]] = []
        room = num_rows * counts.sequence_length
        while room > 0 and len(skipped) < MAX_SKIPPED:
            sample = self._pending.pop(0) if self._pending else self._next()
            if sample is None:
                break
            if (prepared := self._prepared(sample, counts, skipped)) is not None:
                read.append((sample, prepared))
                room -= round_up(prepared.length, self._stage.sample_multiple)
        lengths = [round_up(prepared.length, self._stage.sample_multiple) for _, prepared in read]
        rows, left = pack(lengths, num_rows, counts.sequence_length)
        self._pending = [*(read[number][0] for number in left), *self._pending]
        return [[read[number][1] for number in row] for row in rows]


def pack(lengths: Sequence[int], num_rows: int, sequence_length: int) -> tuple[list[list[int]], list[int]]:
    """Best-fit decreasing: (which of the samples each row holds, in order; those that fit nowhere).

    The longest first, each into the fullest row that still holds it: within 11/9 of the fewest rows (Johnson, 1973).
    """
    rows: list[list[int]] = [[] for _ in range(num_rows)]
    room, left = [sequence_length] * num_rows, []
    for number in sorted(range(len(lengths)), key=lambda number: (-lengths[number], number)):
        fitting = [row for row in range(num_rows) if room[row] >= lengths[number]]
        if not fitting:
            left.append(number)
            continue
        row = min(fitting, key=lambda row: (room[row], row))
        rows[row].append(number)
        room[row] -= lengths[number]
    return [sorted(row) for row in rows], sorted(left)


def open_stream(resolved: Resolved, stage: ResolvedStage, place: Place) -> Stream:
    """The stage's data, as this data-parallel rank reads them."""
    if stage.data.source == "energon":
        return PreparedStream(resolved, stage, place)
    return IndexedStream(build_source(stage.data, resolved.config.seed + stage.index), stage, place)


def build_source(data: DataConfig, seed: int, split: Split = "train") -> RecordSource:
    """The record source that a data config names; ``split``: of scenes."""
    if data.source == "llava_json":
        assert data.path is not None
        return LlavaJsonSource(Path(data.path), Path(data.image_dir) if data.image_dir else None, seed)
    return ScenesSource(
        mode=data.mode,
        seed=seed,
        split=split,
        families=data.families,
        num_turns=data.num_turns,
        num_samples=data.num_samples,
        induction_fraction=data.induction_fraction,
        text_only_fraction=data.text_only_fraction,
    )
