"""Training's view of a prepared dataset: places in checkpoints, a changed number of ranks, pictures that went bad."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.resolve import Resolved
from megatron_sts.data.prepare import prepare
from megatron_sts.data.records import UnreadableDataError
from megatron_sts.mcore.groups import Place
from megatron_sts.train.batches import StageBatches
from megatron_sts.train.feed import PreparedStream
from tests.data.llava_files import good_entries
from tests.dist.ladder import BATCH, resolved_run, written_run
from tests.train.test_feed import same, texts


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    entries = good_entries(folder)
    (folder / "samples.json").write_text(json.dumps(entries))
    prepare(folder / "samples.json", folder, folder / "shards", shard_size_mb=1, num_workers=1)
    return folder / "shards"


def resolved(shards: Path, packing: str, num_workers: int = 0, dp_size: int = 1) -> Resolved:
    stage = {
        "name": "one",
        "steps": 8,
        "batch": {**BATCH, "sequence_length": 192, "packing": packing},
        "vtc": {"sampler": "random", "keep_ratio": 0.5},
    }
    written = written_run(shards, stage, data_parallel_size=dp_size)
    data = {"source": "energon", "path": str(shards), "num_workers": num_workers, "shuffle_buffer_size": 10}
    return resolved_run({**written, "data": data}, dp_size)


def batches(run: Resolved, dp_rank: int = 0) -> StageBatches:
    dp_size = run.data_parallel_size
    return StageBatches(run, run.stages[0], Place(0, 1, 0, 1, dp_rank, dp_size))


def save(stream: StageBatches, folder: Path) -> None:
    """As a checkpoint has it."""
    place = stream.place()
    assert place is not None
    folder.mkdir()
    torch.save(place[1], folder / place[0])


@pytest.mark.timeout(180)
@pytest.mark.parametrize("packing", ["pad", "pack"])
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cut", [1, 5])
def test_a_checkpoint_has_the_place_in_the_data(
    shards: Path, tmp_path: Path, packing: str, num_workers: int, cut: int
) -> None:
    run = resolved(shards, packing, num_workers)
    whole = batches(run)
    fed = []
    for step in range(8):
        if step == cut:
            save(whole, tmp_path / "data")
        fed.append(whole.step(step))
    whole.close()
    resumed = batches(run)
    resumed.restore(tmp_path / "data", cut)
    again = [resumed.step(step) for step in range(cut, 8)]
    resumed.close()
    assert all(same(one, other) for one, other in zip(again, fed[cut:], strict=True))
    assert len(set(texts([batch for step in fed for batch in step]))) > 20


def test_another_number_of_ranks_is_refused(shards: Path, tmp_path: Path) -> None:
    one = batches(resolved(shards, "pad"))
    one.step(0)
    save(one, tmp_path / "data")
    one.close()
    two = batches(resolved(shards, "pad", dp_size=2), dp_rank=1)
    with pytest.raises(ConfigError, match=r"parallel\.data_parallel_size=2: stage one was saved on 1, .*go on with 1"):
        two.restore(tmp_path / "data", 1)
    two.close()


def test_a_killed_worker_ends_the_run(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = batches(resolved(shards, "pad", num_workers=2))
    reading.step(0)
    assert reading._feed is not None and isinstance(reading._feed._stream, PreparedStream)
    iterator: Any = reading._feed._stream._stream._loader._iterator
    with monkeypatch.context() as patch, pytest.raises(UnreadableDataError, match="reads data was killed"):
        patch.setattr(iterator._workers[0], "is_alive", lambda: False)
        for step in range(1, 8):
            reading.step(step)
    reading.close()
