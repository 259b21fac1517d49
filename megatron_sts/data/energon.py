"""An endless stream of records from a prepared dataset, by megatron-energon. Knows no tokens and no batches.

Energon shards the samples over data-parallel ranks and their worker processes, blends, shuffles and resumes. Its workers parse
the turns, and decode and fit the pictures. A sample that cannot be used comes out as a ``SkippedSample``, in its place.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from queue import Empty
from typing import Any

import numpy as np
import torch
from megatron.energon import (
    Cooker,
    CrudeSample,
    DefaultTaskEncoder,
    Sample,
    SavableDataLoader,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    load_dataset,
    stateless,
)
from megatron.energon.errors import reraise_exception
from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError
from megatron.energon.metadataset.loader_interface import LoadedDatasetList

from megatron_sts.config.errors import refuse
from megatron_sts.config.prepared import check_prepared
from megatron_sts.config.stored_samples import TEXT, check_share
from megatron_sts.data.fitting import Fitting
from megatron_sts.data.image import decode_bytes
from megatron_sts.data.llava_json import entry_key, is_clip, parse_entry
from megatron_sts.data.records import Clip, Record, SkippedSample, UnreadableDataError, Views
from megatron_sts.launch.follow import end_with_parent
from megatron_sts.runtime import plain
from megatron_sts.runtime.plain import ARRAYS, Names, PlainDataError

SAMPLES_PER_SLICE = 100
"""Samples read one after another from a shard before the next random place; Energon's documentation uses as many."""
WORKERS = "data.num_workers"
SECONDS_PER_CHECKPOINT = 10.0
"""How often a worker notes its state; resuming reads at most the samples since the last note again."""
ANSWER_S = 1.0
"""How often it is looked whether the worker that is waited for is still there."""
PICTURE_FIELDS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
"""Names of a sample's only picture in shards of WebDataset's habit, in either case."""


def _stored(content: bytes) -> Any:
    """A tensor's memory. torch's own function unpickles anything."""
    return torch.load(io.BytesIO(content), weights_only=True)


_STATE: Names = {
    **ARRAYS,
    ("collections", "OrderedDict"): None,
    ("megatron.energon.flavors.webdataset.sample_loader", "SliceState"): None,
    ("megatron.energon.rng", "SystemRngState"): None,
    ("megatron.energon.state", "FlexState"): None,
    **{
        ("megatron.energon.savable_loader", name): None
        for name in ("SavableDataLoaderState", "SavableDatasetCheckpoint", "SavableDatasetState")
    },
    ("torch._utils", "_rebuild_tensor_v2"): None,
    ("torch.storage", "_load_from_bytes"): _stored,
    ("megatron.core.safe_globals", "safe_load_from_bytes"): _stored,  # where megatron-core has replaced it
}
"""All that the pickled state of a loader names."""


class EnergonStream:
    """The records of one data-parallel rank, without end.

    ``state_dict`` names the very next record: a stream of the same arguments that loads it goes on with that one.
    Every reader (a worker process, or a rank without any) has its own share of each dataset, the shares differ by at most one
    sample, and a reader goes through its share again and again; the shuffle buffer mixes the end of one round with the next.
    """

    def __init__(
        self,
        path: Path,
        *,
        seed: int,
        dp_rank: int,
        dp_size: int,
        num_workers: int,
        shuffle_buffer_size: int,
        fitting: Fitting | None,
    ) -> None:
        """
        Args:
            path: a folder that ``megatron-sts data prepare`` wrote, another with samples KEY.json and KEY.0.jpg, KEY.1.jpg, ...
                (or KEY.jpg) in shards that Energon's command indexed, or an Energon Metadataset YAML that blends some.
            seed: of the order.
            dp_rank: 0-based data-parallel rank.
            dp_size: data-parallel ranks.
            num_workers: worker processes of this rank; 0: this process decodes.
            shuffle_buffer_size: samples (encoded pictures) that a worker holds to draw from; 1 keeps the order of slices.
            fitting: what makes pictures squares; None: they stay as they are.

        Raises:
            ConfigError: ``path`` is no prepared dataset.
        """
        check_prepared(path)
        self._path = path
        self._settings = {
            "parallel.data_parallel_size": dp_size,
            "data.shuffle_buffer_size": shuffle_buffer_size,
            "seed": seed,
            "data-parallel rank": dp_rank,
        }
        self._open = partial(_loader, path, seed, dp_rank, dp_size, shuffle_buffer_size, fitting)
        self._num_workers, self._loader = num_workers, self._open(num_workers)
        self._records: Iterator[Record | SkippedSample] | None = None
        self._restored: Any = None
        self._num_drawn = 0

    def __iter__(self) -> Iterator[Record | SkippedSample]:
        return self

    def __next__(self) -> Record | SkippedSample:
        if self._records is None:
            self._records = iter(self._loader)
        try:
            record = next(self._records)
        except Exception as error:  # whatever file systems, Energon and its workers raise
            raise UnreadableDataError(f"data.path={self._path}: reading failed: {last_line(error)}") from error
        self._num_drawn += 1
        return record

    def state_dict(self) -> dict[str, Any]:
        """Where the stream is, as strings, numbers and bytes."""
        _check_workers(self._loader)
        # Until each of its workers has sent a sample, a restored loader reports a place before the right one.
        settled = self._num_drawn >= max(self._num_workers, 1)
        state = self._loader.save_state_rank() if settled else self._restored
        return {
            "settings": {**self._settings, WORKERS: self._num_workers},
            "dataset": self._dataset_identity(),
            "loader": pickle.dumps(state),
            "skip": 0 if settled else self._num_drawn,
        }

    def load_state_dict(self, state: dict[str, Any]) -> str | None:
        """Go on after the last record of the stream that gave ``state``. Only before the first record of this one.

        Each worker reads a share of its own, and Energon can move none to another. So this stream takes the number of
        workers that the other one had, and returns a line that says so if it was to have another.

        Raises:
            ConfigError: this stream has another number of ranks, another seed, buffer or dataset.
        """
        assert self._num_drawn == 0
        for name, saved in state["settings"].items():
            if name != WORKERS and (here := self._settings[name]) != saved:
                refuse(name, here, f"the checkpoint's place in the data was saved with {saved}", f"set it to {saved}")
        wanted, note = self._num_workers, None
        if (num_workers := state["settings"][WORKERS]) != wanted:
            self._num_workers, self._loader = num_workers, self._open(num_workers)
            note = (
                f"data.num_workers={wanted}: this stage goes on with {num_workers}, because its place in the data is that of "
                f"so many workers; stages that begin later have {wanted}"
            )
        if state["dataset"] != self._dataset_identity():
            refuse("data.path", self._path, "not the dataset of the checkpoint", "use that one, or start a new run")
        try:
            self._restored = plain.loads(state["loader"], _STATE)
        except PlainDataError as error:
            raise PlainDataError(f"the checkpoint's place in the data {error}") from error
        self._loader.restore_state_rank(self._restored)
        for _ in range(state["skip"]):
            next(self)
        return note

    def close(self) -> None:
        """End the worker processes."""
        # torch ends persistent workers when their iterator is deleted; from the garbage collector, that comes after the
        # queues' own end, and takes five seconds a worker.
        if (iterator := self._loader._iterator) is not None:
            iterator._shutdown_workers()

    def _dataset_identity(self) -> str:
        """Of shards, their numbers of samples and the blend; not of the place where they lie."""
        config = _without_paths(self._loader.config()["dataset"])
        return hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()


@edataclass
class StoredSample(Sample):
    """A sample's files. The shuffle buffer holds these, as pictures are small while encoded."""

    text: bytes | None
    """None: it has no such file."""
    pictures: list[bytes]


class _Encoder(DefaultTaskEncoder):
    """What Energon's workers do."""

    decoder = None  # else Energon decodes, and drops what it cannot

    def __init__(self, fitting: Fitting | None) -> None:
        super().__init__()
        self._fitting = fitting
        self.cookers = [Cooker(stored_sample)]

    @stateless
    def encode_sample(self, sample: StoredSample) -> Record | SkippedSample:
        return record_of(sample, self._fitting)


@stateless
def stored_sample(sample: CrudeSample) -> StoredSample:
    numbered = [name for name in sample if name.partition(".")[0].isdecimal()]
    names = sorted(numbered, key=lambda name: int(name.partition(".")[0]))
    names = names or [name for name in sample if name.lower() in PICTURE_FIELDS]
    return StoredSample(**basic_sample_keys(sample), text=sample.get(TEXT), pictures=[sample[name] for name in names])


def record_of(sample: StoredSample, fitting: Fitting | None) -> Record | SkippedSample:
    key = sample.__key__
    if sample.text is None:
        return SkippedSample(key, f"no file KEY.{TEXT} in its shard")
    try:
        entry = json.loads(sample.text)
        key = entry_key(entry, key)
        turns, _ = parse_entry(entry)
        images = [decode_bytes(encoded, f"{place} of {key}").pixels for place, encoded in enumerate(sample.pictures)]
        found = [Clip(tuple(images))] if is_clip(entry) else images
        fitted = found if fitting is None else _fitted(found, fitting)
    except (ValueError, RecursionError) as error:  # of JSON, or a BadSampleError
        return SkippedSample(key, str(error))
    return Record(key, turns, tuple(partial(_same, image) for image in fitted))


def _fitted(images: Sequence[np.ndarray | Clip], fitting: Fitting) -> Sequence[np.ndarray | Clip | Views]:
    """A clip that no tower can take stays one, and is refused where its sample is prepared."""
    if fitting.tiles is None:
        return [image if isinstance(image, Clip) else fitting.fit(image) for image in images]
    return [fitting.views(image, is_alone=len(images) == 1) for image in images]


def _same[Image](image: Image) -> Image:
    return image


class _Answers:
    """A queue of what a worker answers; it ends the wait for one that was killed, for which Energon would wait for ever."""

    def __init__(self, queue: Any, loader: SavableDataLoader) -> None:
        self._queue, self._loader = queue, loader

    def get(self) -> Any:
        """The next answer.

        Raises:
            UnreadableDataError: a worker is gone.
        """
        while True:
            try:
                return self._queue.get(timeout=ANSWER_S)
            except Empty:
                _check_workers(self._loader)


def _check_workers(loader: SavableDataLoader) -> None:
    iterator = loader._iterator if loader.num_workers else None
    if iterator is not None and not all(worker.is_alive() for worker in iterator._workers):
        raise UnreadableDataError("a worker process that reads data was killed; memory may have run out")


def _loader(
    path: Path,
    seed: int,
    dp_rank: int,
    dp_size: int,
    shuffle_buffer_size: int,
    fitting: Fitting | None,
    num_workers: int,
) -> SavableDataLoader:
    workers = WorkerConfig(
        rank=dp_rank,
        world_size=dp_size,
        num_workers=num_workers,
        seed_offset=seed,
        global_error_handler=reraise_exception,  # the default prints the error and drops the sample
    )
    loaded = _load(path, workers)
    dataset = _Encoder(fitting).build_train_datasets(
        datasets=loaded.datasets,
        blend_mode=loaded.blend_mode,
        worker_config=workers,
        batch_size=None,
        shuffle_buffer_size=shuffle_buffer_size,
    )
    loader = get_savable_loader(
        dataset,
        checkpoint_every_sec=SECONDS_PER_CHECKPOINT,
        # In the training process a collection every few samples would walk through the whole model's objects.
        gc_collect_every_n_steps=10 if num_workers else 0,
    )
    if num_workers:
        # A list of this process: its workers keep the queues themselves.
        loader.result_queues = [_Answers(queue, loader) for queue in loader.result_queues]
    loader.pin_memory = False  # records hold numpy arrays, which cannot be pinned
    # It draws a number when reading begins. From the training's own generator that would be another draw after each resume.
    loader.generator = torch.Generator()
    loader.worker_init_fn = partial(_start_worker, os.getpid(), loader.worker_init_fn)
    return loader


def _start_worker(parent: int, initialize: Callable[[int], None], worker: int) -> None:
    """torch's workers look for their parent only between samples, every five seconds."""
    end_with_parent(parent)
    initialize(worker)


def _load(path: Path, workers: WorkerConfig) -> LoadedDatasetList:
    """The datasets that are trained on, each large enough for all workers."""
    loaded = load_split(path, "train", workers, training=True, max_samples_per_sequence=SAMPLES_PER_SLICE)
    num_readers = workers.world_size * max(workers.num_workers, 1)
    for found in loaded.datasets:
        check_share(found.dataset.path, len(found.dataset), num_readers, found.repetitions)
    return loaded


def load_split(path: Path, split: str, workers: WorkerConfig, **settings: Any) -> LoadedDatasetList:
    """The datasets of which a split of ``path`` is made.

    Raises:
        ConfigError: Energon cannot read them, or there are none.
    """
    try:
        loaded = load_dataset(path).get_datasets(split_part=split, worker_config=workers, decoder=None, **settings)
    except (OSError, ValueError, AssertionError, KeyError, TypeError, ZeroDivisionError, EmptyDatasetError) as error:
        # Energon's ways to refuse what a blend says.
        reason = f"Energon cannot read it ({type(error).__name__}: {error})"
        refuse("data.path", path, " ".join(reason.split()), "correct it; a blend names prepared datasets")
    if not loaded.datasets:
        refuse("data.path", path, "names no dataset", "list some")
    return loaded


def last_line(error: Exception) -> str:
    """What went wrong, without the traceback that an error from a worker process has in its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if len(lines) > 1 else f"{type(error).__name__}: {''.join(lines)}".rstrip(": ")


def _without_paths(config: Any) -> Any:
    """Energon marks what may change, as paths, by an underscore."""
    if isinstance(config, dict):
        return {key: _without_paths(value) for key, value in config.items() if not key.startswith("_")}
    return [_without_paths(value) for value in config] if isinstance(config, list | tuple) else config
