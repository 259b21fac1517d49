"""Checkpoints that hold code are refused by name, and it is never run; without our reading it would be."""

from __future__ import annotations

import pickle
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.dist_checkpointing.strategies import torch as strategies
from torch.distributed import checkpoint
from torch.distributed.checkpoint import CheckpointException, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from megatron_sts.mcore.reading import as_data
from tests.runtime.test_plain import Planted


def write(folder: Path, rng: Any) -> Path:
    """A checkpoint in megatron-core's format: tensors, and an object."""
    checkpoint.save({"w": torch.arange(6.0).bfloat16(), "rng": rng}, checkpoint_id=str(folder), no_dist=True)
    return folder


def read(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = {"w": torch.zeros(6, dtype=torch.bfloat16), "rng": None}
    checkpoint.load(state, checkpoint_id=str(folder), no_dist=True)
    return state


def planted(folder: Path, marker: Path, place: str) -> Path:
    write(folder, [Planted(marker)] if place == "object" else [1])
    if place == "metadata":
        file = folder / ".metadata"
        metadata = pickle.loads(file.read_bytes())
        metadata.planner_data = Planted(marker)
        file.write_bytes(pickle.dumps(metadata))
    return folder


@pytest.mark.parametrize(
    ("place", "said"), [("metadata", r"\.metadata holds more than data"), ("object", "its object rng")]
)
def test_planted_code_is_refused_and_not_run(tmp_path: Path, place: str, said: str) -> None:
    marker = tmp_path / "marker"
    folder = planted(tmp_path / "checkpoint", marker, place)
    with as_data(), pytest.raises(CheckpointException, match=rf"{said}.* posix\.mkdir"):
        read(folder)
    assert not marker.exists()
    read(folder)  # the plant works
    assert marker.exists()


def test_random_states_and_tensors_are_read(tmp_path: Path) -> None:
    python, numpy = random.getstate(), np.random.get_state()
    with as_data():
        found = read(write(tmp_path / "checkpoint", [python, numpy, None]))
    assert found["w"].tolist() == list(range(6))
    assert found["rng"][0] == python and found["rng"][2] is None
    np.testing.assert_array_equal(found["rng"][1][1], numpy[1])


def test_paths_of_another_python_are_read(tmp_path: Path) -> None:
    """``.metadata`` holds the path that it was written to, whose class Python 3.13 has in another module."""
    folder = write(tmp_path / "checkpoint", [1])
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    assert isinstance(metadata.storage_meta.checkpoint_id, Path)
    content = pickle.dumps(metadata, protocol=2)
    renamed = re.sub(rb"cpathlib(\._local)?\nPosixPath\n", b"cpathlib._local\nPosixPath\n", content)
    assert b"pathlib._local" in renamed
    (folder / ".metadata").write_bytes(renamed)
    with as_data():
        assert read(folder)["w"].tolist() == list(range(6))


def test_classes_of_earlier_versions_of_megatron_core_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until 0.15 ``.metadata`` was one of its own, with plans of its own. Seen in files that 0.12.1 to 0.15.0 wrote."""

    class MCoreMetadata(Metadata):
        pass

    @dataclass(frozen=True)
    class MCoreSavePlan(SavePlan):
        mcore_data: dict[str, Any] | None = None

    folder = write(tmp_path / "checkpoint", [1])
    found = pickle.loads((folder / ".metadata").read_bytes())
    metadata = MCoreMetadata(found.state_dict_metadata, found.planner_data, found.storage_data, found.storage_meta)
    metadata.mcore_data, metadata.all_local_plans = {"w": {}}, [MCoreSavePlan([], mcore_data={"w": {}})]  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        for kind in (MCoreMetadata, MCoreSavePlan):
            kind.__module__, kind.__qualname__ = strategies.__name__, kind.__name__
            patch.setattr(strategies, kind.__name__, kind)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with as_data():
        assert read(folder)["w"].tolist() == list(range(6))


def test_only_the_block_reads_so(tmp_path: Path) -> None:
    before = FileSystemReader.read_metadata
    with as_data():
        assert FileSystemReader.read_metadata is not before
    assert FileSystemReader.read_metadata is before
