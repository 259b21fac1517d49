"""Turns a stage's data into micro-batches. The samples of a step depend on its number only, never on the layout."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.config.schema import DataConfig
from megatron_sts.data.batch import Batch
from megatron_sts.data.llava_json import LlavaJsonSource
from megatron_sts.data.records import BadSampleError, Record, RecordSource, SkippedSample
from megatron_sts.data.scenes.source import ScenesSource
from megatron_sts.mcore.groups import Place
from megatron_sts.model.prepare import BatchPreparer
from megatron_sts.runtime.device import current_device


def build_source(data: DataConfig, seed: int) -> RecordSource:
    """The record source that a data config names."""
    if data.source == "llava_json":
        assert data.path is not None
        return LlavaJsonSource(Path(data.path), Path(data.image_dir) if data.image_dir else None, seed)
    return ScenesSource(
        mode=data.mode,
        seed=seed,
        split="train",
        families=data.families,
        num_turns=data.num_turns,
        num_samples=data.num_samples,
        induction_fraction=data.induction_fraction,
        text_only_fraction=data.text_only_fraction,
    )


class StageBatches:
    """The micro-batches of each step of a stage, as this rank needs them. Stateless: resuming needs only the step."""

    def __init__(self, resolved: Resolved, stage: ResolvedStage, place: Place) -> None:
        self._stage, self._place = stage, place
        self._source = build_source(stage.data, resolved.config.seed + stage.index)
        self._preparer = BatchPreparer(
            resolved,
            stage,
            needs_pixels=place.is_first_stage,
            # Files can be corrupt: the stage that computes the loss must find out too. Drawn scenes cannot.
            checks_pixels=place.is_last_stage and stage.data.source != "scenes",
        )

    def step(self, step: int) -> Iterator[Batch]:
        """The step's micro-batches for this data-parallel rank, on the device."""
        batch, place = self._stage.config.batch, self._place
        first = step * batch.global_batch_size
        for micro in range(self._stage.num_microbatches):
            start = first + (micro * place.dp_size + place.dp_rank) * batch.micro_batch_size
            records = [(index, self._record(index)) for index in range(start, start + batch.micro_batch_size)]
            yield self._preparer.batch(records).to(current_device().torch_device)

    def _record(self, index: int) -> Record | SkippedSample:
        try:
            return self._source[index]
        except BadSampleError as error:
            return SkippedSample(error.key or f"number {index}", str(error))
