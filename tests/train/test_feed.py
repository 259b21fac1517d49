"""Reading a stage's samples: rows, what is pending, and going on where it stopped."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_sts.config.resolve import Resolved
from megatron_sts.data.batch import Batch
from megatron_sts.mcore.groups import Place
from megatron_sts.train.batches import StageBatches
from megatron_sts.train.feed import MAX_SKIPPED, Feed, pack
from tests.dist.ladder import BATCH, Written, resolved_run, write_samples, written_run


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 6))
def test_every_sample_is_in_one_row_or_left(lengths: list[int], num_rows: int) -> None:
    rows, left = pack(lengths, num_rows, 50)
    assert sorted([*left, *(number for row in rows for number in row)]) == list(range(len(lengths)))
    room = [50 - sum(lengths[number] for number in row) for row in rows]
    assert min(room) >= 0 and all(row == sorted(row) for row in rows)
    assert all(lengths[number] > max(room) for number in left)


def test_the_longest_find_the_fullest_row() -> None:
    assert pack([4, 6, 5, 5], 2, 10) == ([[0, 1], [2, 3]], [])
    assert pack([3, 7, 5, 2, 6], 2, 10) == ([[0, 1], [3, 4]], [2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("feed")
    write_samples(path)
    return path


def resolved(folder: Path, packing: str, context_parallel_size: int = 1, **vtc: Any) -> Resolved:
    stage: Written = {"name": "one", "steps": 6, "batch": {**BATCH, "sequence_length": 96, "packing": packing}}
    layout = {"context_parallel_size": context_parallel_size}
    return resolved_run(written_run(folder, {**stage, "vtc": vtc or None}, **layout), context_parallel_size)


def place(dp_rank: int = 0, dp_size: int = 1) -> Place:
    return Place(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, dp_rank=dp_rank, dp_size=dp_size)


def feed(run: Resolved, dp_rank: int = 0, dp_size: int = 1) -> Feed:
    return Feed(run, run.stages[0], place(dp_rank, dp_size))


def texts(batches: list[Batch]) -> Iterator[tuple[int, ...]]:
    """The tokens of each sample, images left out."""
    for batch in batches:
        segments = batch.segments if batch.segments is not None else (batch.tokens != 0).int()
        for row, numbers, is_visual in zip(batch.tokens, segments, batch.is_visual, strict=True):
            for number in range(1, int(numbers.max()) + 1):
                yield tuple(row[(numbers == number) & ~is_visual].tolist())


def same(left: list[Batch], right: list[Batch]) -> bool:
    return all(
        torch.equal(a.tokens, b.tokens) and torch.equal(a.position_ids, b.position_ids)
        for a, b in zip(left, right, strict=True)
    )


def test_packing_loses_and_repeats_no_sample(folder: Path) -> None:
    packed = feed(resolved(folder, "pack"))
    in_rows = Counter(texts([batch for step in range(6) for batch in packed.step(step).batches]))
    state = packed.state_dict()
    num_read, pending = state["stream"]["num_read"], state["pending"]
    assert in_rows.total() == num_read - len(pending) > 6 * BATCH["global_batch_size"]  # type: ignore[operator]
    # The same stream, a sample a row: its first num_read samples are those in rows and those that are pending.
    one_a_row = feed(resolved(folder, "pad"))
    in_order = islice((text for step in count() for text in texts(one_a_row.step(step).batches)), num_read)
    numbered = dict(enumerate(in_order))
    assert in_rows + Counter(numbered[number] for number in pending) == Counter(numbered.values())


def test_packed_samples_can_be_cut_into_the_pieces_of_context_parallel_ranks(folder: Path) -> None:
    batches = feed(resolved(folder, "pack", context_parallel_size=2)).step(0).batches
    num_pairs, num_padded = 0, 0
    for batch in batches:
        for row, loss_mask in zip(batch.segments, batch.loss_mask, strict=True):
            lengths = row.bincount().tolist()
            assert sum(lengths) == 96 and not any(length % 4 for length in lengths)
            assert row.tolist() == [*sorted(row[row > 0].tolist()), *[0] * lengths[0]]
            ends = [int((row == number).nonzero()[-1]) for number in range(1, len(lengths))]
            assert not loss_mask[ends].any()
            num_pairs += sum(length**2 for length in lengths)
        num_padded += int((batch.segments > 0).sum()) - batch.num_tokens
    assert sum(batch.load.num_pairs for batch in batches) == num_pairs
    assert num_padded > 0


@pytest.mark.parametrize("packing", ["none", "pad", "pack"])
@pytest.mark.parametrize("cut", [1, 4])
def test_reading_goes_on_where_it_stopped(folder: Path, packing: str, cut: int) -> None:
    run = resolved(folder, packing, keep_ratio=1.0, schedule="linear", final_keep_ratio=0.25)
    whole = feed(run)
    fed = [whole.step(step) for step in range(6)]
    resumed = feed(run)
    resumed.load_state_dict(fed[cut - 1].state)
    assert all(same(resumed.step(step).batches, fed[step].batches) for step in range(cut, 6))


@pytest.mark.parametrize("packing", ["none", "pad"])
def test_rows_of_one_sample_are_the_same_on_any_number_of_ranks(folder: Path, packing: str) -> None:
    run = resolved(folder, packing)
    one = feed(run)
    one.seek(2)
    whole = sorted(texts(one.step(2).batches))
    halves = []
    two = resolved_run(run.config.model_dump() | {"parallel": {"data_parallel_size": 2}}, 2)
    for rank in range(2):
        part = feed(two, rank, 2)
        part.seek(2)
        halves += list(texts(part.step(2).batches))
    assert sorted(halves) == whole


def test_rows_are_as_long_as_they_must_be(folder: Path) -> None:
    for step in range(3):
        short, padded = (feed(resolved(folder, packing)) for packing in ("none", "pad"))
        short.seek(step)
        padded.seek(step)
        one, other = short.step(step).batches, padded.step(step).batches
        longest = max(int((batch.tokens != 0).sum(1).max()) for batch in other)
        assert {batch.sequence_length for batch in one} == {longest} and other[0].sequence_length == 96
        assert sum(batch.load.num_tokens for batch in one) == longest * 4
        assert all(torch.equal(a.tokens, b.tokens[:, :longest]) for a, b in zip(one, other, strict=True))


def test_packed_reading_depends_on_the_ranks(folder: Path) -> None:
    assert [resolved(folder, name).stages[0].is_seekable for name in ("none", "pad", "pack")] == [True, True, False]


def test_packing_without_a_usable_sample_ends(folder: Path, tmp_path: Path) -> None:
    entries = json.loads((folder / "samples.json").read_text())
    (tmp_path / "samples.json").write_text(json.dumps([entry | {"conversations": []} for entry in entries]))
    fed = feed(resolved(tmp_path, "pack")).step(0)
    assert len(fed.batches[0].skipped) == MAX_SKIPPED and sum(batch.num_samples for batch in fed.batches) == 0


def test_a_step_of_longer_samples_loses_none_of_what_is_pending(folder: Path) -> None:
    run = resolved(folder, "pack")
    long = feed(run)
    # A full step after sparse ones: what was left of short samples may be more than a step holds.
    long._pending = [next(long._stream) for _ in range(40)]
    batches = [batch for step in range(3) for batch in long.step(step).batches]
    state = long.state_dict()
    assert sum(batch.num_samples for batch in batches) + len(state["pending"]) == state["stream"]["num_read"]


def test_text_with_half_a_surrogate_pair_is_skipped(folder: Path, tmp_path: Path) -> None:
    text, broken = (folder / "samples.json").read_text(), {"from": "gpt", "value": "nice \ud83d"}
    entries = [entry | {"image": [], "conversations": [broken]} for entry in json.loads(text)]
    (tmp_path / "samples.json").write_text(json.dumps(entries))
    fed = feed(resolved(tmp_path, "pad")).step(0)
    assert len(fed.batches[0].skipped) == 4 and "not Unicode text" in fed.batches[0].skipped[0].reason


def test_reading_that_never_ends_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = resolved(folder, "pad").config.model_dump() | {"parallel": {"timeout_s": 0.1}}
    run, release = resolved_run(written, 1), Event()
    monkeypatch.setattr(Feed, "step", lambda *_: release.wait(60))
    batches = StageBatches(run, run.stages[0], place())
    with pytest.raises(TimeoutError, match=r"step 0 was not read within parallel\.timeout_s=0\.1"):
        batches.step(0)
    release.set()
    batches.close()


def test_a_bad_sample_in_tiles_is_left_out_alone(tmp_path: Path) -> None:
    """Its size decides how long a sample is: too many tokens, or a picture that cannot be read, are told with the sample's name."""
    write_samples(tmp_path, 4)
    entries = json.loads((tmp_path / "samples.json").read_text())
    for entry, names in zip(entries, (["0-0.png"], ["0-0.png"] * 5, ["cut.png"], ["0-0.png"]), strict=True):
        entry["image"] = names
        entry["conversations"][0]["value"] = "<image>" * len(names) + "what is it"
    (tmp_path / "samples.json").write_text(json.dumps(entries))
    (tmp_path / "cut.png").write_bytes((tmp_path / "0-0.png").read_bytes()[:200])
    stage: Written = {"name": "one", "steps": 1, "batch": {**BATCH, "global_batch_size": 4, "micro_batch_size": 4}}
    fed = feed(resolved_run(written_run(tmp_path, stage, model="tiles"))).step(0)
    skipped = {sample.key: sample.reason for sample in fed.batches[0].skipped}
    assert sorted(skipped) == ["1", "2"] and "cut.png" in skipped["2"]
    assert "tokens exceed the stage's 72; raise stages.one.batch.sequence_length=72 to" in skipped["1"]
    assert fed.batches[0].num_samples == 2 and fed.batches[0].load.num_images > 2
