"""Samples of a prepared dataset by their number, through Energon's index. Knows no order of training."""

from __future__ import annotations

import random
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron.energon import WorkerConfig
from megatron.energon.flavors.webdataset.itar_reader import ShardInfosITarReader

from megatron_sts.config.prepared import check_prepared
from megatron_sts.data.energon import last_line, load_split, record_of, stored_sample
from megatron_sts.data.fitting import Fitting
from megatron_sts.data.records import BadSampleError, Record, SkippedSample, UnreadableDataError

NUM_OPEN = 5
"""Shards of a dataset that stay open."""


class PreparedSamples:
    """A ``RecordSource`` over ``num_samples`` of a split, drawn by ``seed`` and in the order in which shards hold them. Of a blend each
    dataset's samples count once, whatever its weight."""

    def __init__(self, path: Path, split: str, num_samples: int, *, seed: int, fitting: Fitting | None) -> None:
        """
        Raises:
            ConfigError: ``path`` is no prepared dataset, or has no such split.
        """
        check_prepared(path)
        self._path, self._fitting = path, fitting
        alone = WorkerConfig(rank=0, world_size=1, num_workers=0)
        loaded = load_split(path, split, alone, training=False)
        self._datasets: list[Any] = [found.dataset for found in loaded.datasets]
        self._readers = [
            ShardInfosITarReader(each.path, each.shards, sample_filter=each.sample_filter, itar_cache_size=NUM_OPEN)
            for each in self._datasets
        ]
        ranges = [
            (0, len(each)) if each.subset is None else each.subset.compute_subset(len(each)) for each in self._datasets
        ]
        self._first = [start for start, _ in ranges]
        self._ends = list(accumulate(end - start for start, end in ranges))
        self._numbers = sorted(random.Random(seed).sample(range(self._ends[-1]), num_samples))

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        number = self._numbers[index]
        which = bisect_right(self._ends, number)
        within = self._first[which] + number - (self._ends[which - 1] if which else 0)
        try:
            found = self._readers[which][within]
            sample = None if found is None else stored_sample(self._datasets[which].load_sample(found))
        except Exception as error:  # whatever file systems and Energon raise
            raise UnreadableDataError(f"data.path={self._path}: reading failed: {last_line(error)}") from error
        if sample is None:
            raise BadSampleError("its split.yaml excludes it", f"number {number}")
        record = record_of(sample, self._fitting)
        if isinstance(record, SkippedSample):
            raise BadSampleError(record.reason, record.key)
        return record
