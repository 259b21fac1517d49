"""The Energon stream: every sample once an epoch over all ranks, exact resumption, blends, and bad samples in their place."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from megatron_sts.config.errors import ConfigError
from megatron_sts.data.energon import EnergonStream
from megatron_sts.data.fitting import Fitting
from megatron_sts.data.prepare import prepare
from megatron_sts.data.records import Record, SkippedSample, Turn, UnreadableDataError
from megatron_sts.runtime.dist import process_group
from tests.data.llava_files import NUM_GOOD, good_entries, picture, turns, write_json
from tests.dist.launch import run_ranks

SIZE = 24
Open = Callable[..., EnergonStream]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 samples in one shard."""
    folder = tmp_path_factory.mktemp("energon")
    source = write_json(folder / "source" / "llava.json", good_entries(folder / "source"))
    prepare(source, source.parent, folder / "out", shard_size_mb=1, num_workers=1)
    return folder / "out"


@pytest.fixture
def stream(prepared: Path) -> Iterator[Open]:
    """``stream(**changes)``: a stream of one rank; closed at the end."""
    opened: list[EnergonStream] = []

    def start(**changes: Any) -> EnergonStream:
        arguments: dict[str, Any] = {
            "path": prepared, "seed": 1, "dp_rank": 0, "dp_size": 1, "num_workers": 0, "shuffle_buffer_size": 8, "fitting": Fitting(SIZE),
        }  # fmt: skip
        opened.append(EnergonStream(**{**arguments, **changes}))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def keys(stream: EnergonStream, count: int) -> list[str]:
    return [next(stream).key for _ in range(count)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_records_hold_the_turns_and_fitted_pictures(stream: Open, prepared: Path, num_workers: int) -> None:
    entries = {entry["id"]: entry for entry in json.loads((prepared.parent / "source" / "llava.json").read_text())}
    opened = stream(num_workers=num_workers, shuffle_buffer_size=1)
    records = [next(opened) for _ in range(NUM_GOOD)]
    assert {record.key for record in records} == set(entries)
    for record in records:
        assert isinstance(record, Record)
        entry = entries[record.key]
        question, answer = (turn["value"] for turn in entry["conversations"])
        assert record.turns == (Turn("user", question), Turn("assistant", answer))
        names = [entry["image"]] if "image" in entry else entry.get("images", [])
        assert len(record.images) == len(names)
        for source, name in zip(record.images, names, strict=True):
            image = source()
            assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8
            # The picture is 50 x 40: padded above and below by a tenth of the square each, and scaled down.
            part = np.asarray(Image.open(prepared.parent / "source" / name).resize((SIZE, SIZE * 4 // 5)))
            middle = slice(SIZE // 4, 3 * SIZE // 4)
            difference = image[middle].astype(float).mean() - part.astype(float).mean()
            assert abs(difference) < 6  # grey levels: means of 300 and 450 pixels of noise, each uncertain by 2


def test_pictures_keep_their_size_without_fitting(stream: Open) -> None:
    opened = stream(fitting=None)
    shapes = {image().shape for _ in range(20) for image in getattr(next(opened), "images", ())}
    assert shapes == {(40, 50, 3)}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_share_an_epoch(stream: Open, num_workers: int) -> None:
    epochs = []
    for rank in range(2):
        opened = stream(dp_rank=rank, dp_size=2, num_workers=num_workers, shuffle_buffer_size=1)
        epochs.append([keys(opened, NUM_GOOD // 2) for _ in range(2)])
    (first, first_again), (second, second_again) = epochs
    assert not set(first) & set(second)
    assert set(first) == set(first_again) and set(second) == set(second_again)
    assert Counter(first + second) == Counter({f"good-{number}": 1 for number in range(NUM_GOOD)})


def draw_half() -> None:
    """A rank of a gloo group, with a worker process, prints its half of the epoch."""
    with process_group(60.0):
        rank = torch.distributed.get_rank()
        torch.distributed.all_reduce(torch.ones(1))
        opened = EnergonStream(
            Path(os.environ["DATA"]),
            seed=1,
            dp_rank=rank,
            dp_size=2,
            num_workers=1,
            shuffle_buffer_size=1,
            fitting=Fitting(8),
        )
        print(json.dumps(keys(opened, NUM_GOOD // 2)))
        opened.close()
        torch.distributed.barrier()


def test_ranks_of_a_process_group_share_an_epoch(prepared: Path) -> None:
    halves = [json.loads(output.splitlines()[-1]) for output in run_ranks(draw_half, 2, 120, DATA=prepared)]
    assert Counter(halves[0] + halves[1]) == Counter({f"good-{number}": 1 for number in range(NUM_GOOD)})


def test_seed_and_buffer_decide_the_order(stream: Open) -> None:
    orders = [keys(stream(seed=seed, shuffle_buffer_size=size), 40) for seed, size in ((1, 8), (1, 8), (2, 8), (1, 20))]
    assert orders[0] == orders[1] and len({tuple(order) for order in orders}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("cut", [0, 1, 2, 7, 70])
def test_resuming_goes_on_with_the_next_record(stream: Open, num_workers: int, cut: int) -> None:
    """Saved after ``cut`` records, and again soon after resuming, in the second epoch too."""
    whole = keys(stream(num_workers=num_workers), 90)
    for cut_again in (0, 1, 5) if cut == 7 else (1,):
        first, second, third = (stream(num_workers=num_workers) for _ in range(3))
        drawn = keys(first, cut)
        second.load_state_dict(through_a_checkpoint(first.state_dict()))
        drawn += keys(second, cut_again)
        third.load_state_dict(through_a_checkpoint(second.state_dict()))
        assert drawn + keys(third, 90 - cut - cut_again) == whole


@pytest.mark.slow
@pytest.mark.parametrize("cut", [20, 40, 75])
def test_resuming_from_a_later_note_of_the_workers(stream: Open, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    """Workers note their state every few samples, as they do every few seconds in a long run."""
    monkeypatch.setattr("megatron_sts.data.energon.SECONDS_PER_CHECKPOINT", 0.0)
    whole = keys(stream(num_workers=2), 90)
    first, second = stream(num_workers=2), stream(num_workers=2)
    drawn = keys(first, cut)
    state = first.state_dict()
    noted = [worker.state.sample_index for worker in pickle.loads(state["loader"]).worker_states]
    assert min(noted) > 1
    second.load_state_dict(state)
    assert drawn + keys(second, 90 - cut) == whole


def through_a_checkpoint(state: dict[str, Any]) -> dict[str, Any]:
    """Written and read as torch does it, which unpickles plain types only."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    assert loaded == state
    return loaded


def test_saving_disturbs_nothing(stream: Open) -> None:
    saving, quiet = stream(num_workers=2), stream(num_workers=2)
    drawn = []
    for _ in range(20):
        drawn += keys(saving, 1)
        pickle.dumps(saving.state_dict())
    assert drawn == keys(quiet, 20)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dp_size": 2}, r"parallel\.data_parallel_size=2: .* saved with 1; set it to 1"),
        ({"shuffle_buffer_size": 9}, r"data\.shuffle_buffer_size=9: .* saved with 8; set it to 8"),
        ({"seed": 5}, r"seed=5: .* saved with 1; set it to 1"),
    ],
)
def test_another_layout_is_refused(stream: Open, changes: dict[str, int], said: str) -> None:
    first = stream()
    keys(first, 3)
    with pytest.raises(ConfigError, match=said):
        stream(**changes).load_state_dict(first.state_dict())


@pytest.mark.parametrize(("saved", "here"), [(2, 0), (0, 2)])
def test_another_number_of_workers_goes_on_with_the_saved_one(stream: Open, saved: int, here: int) -> None:
    whole = keys(stream(num_workers=saved), 80)
    first, second, third = stream(num_workers=saved), stream(num_workers=here), stream(num_workers=here)
    drawn = keys(first, 23)
    note = second.load_state_dict(through_a_checkpoint(first.state_dict()))
    assert note is not None and note.startswith(f"data.num_workers={here}: this stage goes on with {saved}, because")
    drawn += keys(second, 9)
    assert third.load_state_dict(second.state_dict()) == note
    assert drawn + keys(third, 80 - 23 - 9) == whole


def small(folder: Path, name: str, count: int) -> Path:
    """A prepared folder of ``count`` samples with one picture."""
    source = folder / "source"
    entries = [{"id": f"{name}-{n}", "image": f"{name}{n}.png", "conversations": turns(1)} for n in range(count)]
    for number in range(count):
        picture(source / f"{name}{number}.png", number)
    prepare(write_json(source / f"{name}.json", entries), source, folder / name, shard_size_mb=1, num_workers=1)
    return folder / name


def write_blend(path: Path, **weights: int) -> Path:
    blend = "".join(f"      - {{weight: {weight}, path: {name}}}\n" for name, weight in weights.items())
    head = "__module__: megatron.energon\n__class__: MetadatasetV2\nsplits:\n  train:\n    blend:\n"
    path.write_text(head + blend)
    return path


def test_another_dataset_is_refused_but_not_another_place(stream: Open, tmp_path: Path) -> None:
    first = stream(path=small(tmp_path, "a", 5))
    keys(first, 2)
    with pytest.raises(ConfigError, match=r"data\.path=.*: not the dataset of the checkpoint"):
        stream(path=small(tmp_path, "b", 6)).load_state_dict(first.state_dict())
    state = first.state_dict()
    moved = stream(path=(tmp_path / "a").rename(tmp_path / "moved"))
    moved.load_state_dict(state)
    assert keys(moved, 1)[0].startswith("a-")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_blend_draws_by_weight(stream: Open, tmp_path: Path, num_workers: int) -> None:
    small(tmp_path, "a", 5), small(tmp_path, "b", 9)
    blend = write_blend(tmp_path / "blend.yaml", a=1, b=3)
    drawn = keys(stream(path=blend, num_workers=num_workers), 600)
    share = sum(key.startswith("a-") for key in drawn) / 600
    # Independent draws: standard deviation sqrt(1/4 x 3/4 / 600) = 0.018. A right blend fails with p = 1e-5 over all seeds;
    # the seed is fixed, and weights 1:2 or 1:1 are 4.7 and 14 deviations away.
    assert abs(share - 0.25) < 4.4 * 0.0177
    first, second = stream(path=blend, num_workers=num_workers), stream(path=blend, num_workers=num_workers)
    keys(first, 33)
    second.load_state_dict(first.state_dict())
    assert keys(second, 30) == drawn[33:63]


def test_blend_of_what_is_not_there_is_refused(stream: Open, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.path=.*blend\.yaml: .*gone"):
        stream(path=write_blend(tmp_path / "blend.yaml", gone=1))
    (tmp_path / "broken.yaml").write_text("splits: [")
    with pytest.raises(ConfigError, match=r"data\.path=.*broken\.yaml: not valid YAML"):
        stream(path=tmp_path / "broken.yaml")
    (tmp_path / "typo.yaml").write_text("splits: {train: {blend: 3}}")
    with pytest.raises(ConfigError, match=r"data\.path=.*typo\.yaml: "):
        stream(path=tmp_path / "typo.yaml")


@pytest.mark.parametrize("blended", [False, True])
def test_dataset_with_fewer_samples_than_readers_is_refused(stream: Open, tmp_path: Path, blended: bool) -> None:
    path = small(tmp_path, "a", 5)
    path = write_blend(tmp_path / "blend.yaml", a=1) if blended else path
    with pytest.raises(ConfigError, match=r"data\.path=.*a: 5 samples for 6 readers"):
        stream(path=path, dp_size=3, num_workers=2)


def test_unprepared_folder_is_refused(stream: Open, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.path=.*: not a prepared dataset; .*megatron-sts data prepare"
    ) as refusal:
        stream(path=tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_sample_that_is_spoilt_later_is_skipped_in_its_place(stream: Open, tmp_path: Path, num_workers: int) -> None:
    path = small(tmp_path, "a", 6)
    order = keys(stream(path=path, num_workers=num_workers), 12)
    shard = path / "shard-000000.tar"
    with tarfile.open(shard) as tar:
        places = {name: tar.getmember(name).offset_data for name in ("000000002.0.png", "000000004.json")}
    with shard.open("r+b") as file:
        for place in places.values():
            file.seek(place)
            file.write(b"\0" * 40)
    spoilt = stream(path=path, num_workers=num_workers)
    records = [next(spoilt) for _ in range(12)]
    # Text that cannot be read does not tell its id: the key in the shard names the sample then.
    assert [record.key for record in records] == ["000000004" if key == "a-4" else key for key in order]
    skipped = {record.key: record.reason for record in records if isinstance(record, SkippedSample)}
    assert set(skipped) == {"a-2", "000000004"}
    assert "no picture in a known format" in skipped["a-2"]


@pytest.mark.slow
def test_a_worker_that_is_killed_before_it_answers(stream: Open) -> None:
    """The question where it is has reached it; nobody may wait for the answer for ever."""
    opened = stream(num_workers=1)
    next(opened)
    assert opened._loader._iterator is not None
    [worker] = opened._loader._iterator._workers
    raising = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's, in main threads; training reads in another one
    os.kill(worker.pid, signal.SIGSTOP)
    killing = threading.Timer(0.5, os.kill, (worker.pid, signal.SIGKILL))
    killing.start()
    try:
        with pytest.raises(UnreadableDataError, match="a worker process that reads data was killed"):
            opened.state_dict()
    finally:
        killing.join()
        signal.signal(signal.SIGCHLD, raising)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_draws_nothing_from_the_trainings_random_numbers(stream: Open, num_workers: int) -> None:
    """Or each resume, which begins to read anew, would shift them."""
    before = torch.get_rng_state()
    next(stream(num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_end_with_the_stream(stream: Open) -> None:
    before = set(multiprocessing.active_children())
    with closing(stream(num_workers=2)) as opened:
        keys(opened, 3)
        assert len(set(multiprocessing.active_children()) - before) == 2
    assert set(multiprocessing.active_children()) <= before


HOLD = """
import sys, time
from pathlib import Path
from megatron_sts.data import energon
from megatron_sts.data.fitting import Fitting

record, calls = energon.record_of, []

def first_only(*args):
    calls.append(1)
    time.sleep(0 if len(calls) == 1 else 1000)
    return record(*args)

energon.record_of = first_only
stream = energon.EnergonStream(Path(sys.argv[1]), seed=1, dp_rank=0, dp_size=1, num_workers=2, shuffle_buffer_size=4,
                               fitting=Fitting(8))
next(stream)
print("drawn", flush=True)
time.sleep(100)
"""


@pytest.mark.slow
def test_workers_end_with_a_killed_parent(prepared: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", HOLD, str(prepared)], stdout=subprocess.PIPE)
    assert parent.stdout is not None and parent.stdout.readline() == b"drawn\n"
    # Both hang in a read: torch's own workers look for their parent only between samples.
    workers = psutil.Process(parent.pid).children(recursive=True)
    assert len(workers) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    assert psutil.wait_procs(workers, timeout=60)[1] == []
