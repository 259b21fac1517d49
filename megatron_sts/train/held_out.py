"""The samples of a validation: the same ones each time, whatever run, layout and step. Must not know what becomes of them."""

from __future__ import annotations

from pathlib import Path

from megatron_sts.config.held_out import HeldOut
from megatron_sts.config.resolve import Resolved, ResolvedStage
from megatron_sts.data.batch import Batch
from megatron_sts.data.records import RecordSource
from megatron_sts.mcore.groups import Place
from megatron_sts.train.agreement import check_shapes
from megatron_sts.train.ahead import Ahead
from megatron_sts.train.batches import share
from megatron_sts.train.feed import Feed, IndexedStream, build_source
from megatron_sts.vision.tower import fitting_of

SEED = 0
"""Which samples are drawn must not depend on the run's seed, or losses of two runs could not be compared."""


class HeldOutStream(IndexedStream):
    """A data-parallel rank's part of the first ``num_samples`` of a source, once."""

    def __init__(self, source: RecordSource, num_samples: int, stage: ResolvedStage, place: Place) -> None:
        super().__init__(source, stage, place)
        self._num_samples = num_samples

    @property
    def is_over(self) -> bool:
        return self.next_index >= self._num_samples


class HeldOutBatches:
    """One validation's micro-batches on this rank, in rounds of as many as a step has; the next round is read while one computes."""

    def __init__(self, resolved: Resolved, stage: ResolvedStage, place: Place, source: RecordSource | None) -> None:
        """``stage``: as it is validated; ``source``: on the ranks that read (``is_first_of_copy``)."""
        self._stage, self._place, self._timeout_s = stage, place, resolved.config.parallel.timeout_s
        self._first_stage_sees_pixels = resolved.first_stage_sees_pixels(stage)
        self.is_over = True
        """Whether this rank has no samples left; others may, and until then has it micro-batches of padding alone."""
        self._reader: Ahead | None = None
        if source is not None:
            assert stage.held_out is not None
            feed = Feed(resolved, stage, place, HeldOutStream(source, stage.held_out.num_samples, stage, place))
            self._reader, self.is_over = Ahead(feed.step, "validation"), False
            self._next = self._reader.submit(0)

    def round(self, number: int) -> list[Batch]:
        """The next round's micro-batches for this model copy, on the host; a collective of its ranks."""
        batches = None
        if self._reader is not None:
            try:
                fed = self._next.result(self._timeout_s)
            except TimeoutError as error:
                why = f"was not read within parallel.timeout_s={self._timeout_s:g}"
                raise TimeoutError(f"round {number} of a validation {why}") from error
            batches, self.is_over = fed.batches, fed.is_last
            self._next = self._reader.submit(number + 1)
        shared = share(batches, self._place, first_stage_sees_pixels=self._first_stage_sees_pixels)
        check_shapes(self._stage, 0, shared)
        return shared

    def close(self) -> None:
        """Stops reading ahead, and waits for no read: a rank may be failing, or be told to stop."""
        if self._reader is not None:
            self._reader.close(0.0)


def open_samples(resolved: Resolved, held_out: HeldOut) -> RecordSource:
    """The samples, in the order in which they are dealt out."""
    if held_out.data.source == "energon":
        from megatron_sts.data.energon_samples import PreparedSamples  # a second

        vision, path = resolved.config.model.vision, Path(str(held_out.data.path))
        fitting = fitting_of(vision) if vision else None
        return PreparedSamples(path, held_out.split, held_out.num_samples, seed=SEED, fitting=fitting)
    return build_source(held_out.data, SEED, "eval")
