"""Pictures in tiles train in parallel layouts as on one rank: compressed and whole, padded and packed rows."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.dist.ladder import Trained, Written, train_alone, train_layouts, write_inputs, written_run
from tests.dist.launch import run_ranks
from tests.dist.test_parity import ALL_OVERLAP, PP, TP, check_same

pytestmark = pytest.mark.timeout(300)  # the first test trains all layouts

LAYOUTS: dict[str, dict[str, object]] = {
    "TP2 SP": {TP: 2, "sequence_parallel": True},
    "PP2": {PP: 2},
    "DP2 all overlap": ALL_OVERLAP,
    "CP2": {"context_parallel_size": 2, **ALL_OVERLAP},
    "PP2, the tower on both": {PP: 2, "vision": "spread"},
}
BATCH = {"global_batch_size": 4, "micro_batch_size": 1, "sequence_length": 128, "max_images": 2}
SPARSE = {
    "name": "sparse",
    "freeze": ["vision", "language"],
    "steps": 3,
    "vtc": {"keep_ratio_by_image": [0.75, 0.5], "sampler": "random"},
    "batch": BATCH,
}
UNIFORM = {"name": "uniform", "steps": 3, "vtc": {"keep_ratio": 0.5}, "batch": {**BATCH, "packing": "none"}}
PACKED = {"name": "packed", "steps": 2, "batch": {**BATCH, "packing": "pack"}}
"""Data- and context-parallel ranks pack other samples together."""
SIZES = ((64, 40), (30, 70), (60, 60), (33, 100))
"""Width and height. The first and the third fill more tiles than their tokens may, and are interpolated."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiles")
    write_inputs(path, ("tiles",))
    for number, file in enumerate(sorted(path.glob("*.png"))):
        Image.open(file).resize(SIZES[number % len(SIZES)]).save(file)
    return path


def config(folder: Path, layout: dict[str, object]) -> Written:
    stages = [SPARSE, UNIFORM, PACKED] if {PP, TP} & layout.keys() else [SPARSE, UNIFORM]
    if "vision" in layout:
        stages = [SPARSE, {**UNIFORM, "freeze": ["vision"], "vtc": None}]
    return written_run(folder, *stages, model="tiles", **layout)


@functools.cache
def alone(folder: Path, stages: str) -> Trained:
    return train_alone({**config(folder, {}), "stages": json.loads(stages)})


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[str, Trained]:
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps({name: config(folder, layout) for name, layout in LAYOUTS.items()}))
    run_ranks(train_layouts, 2, 240, JOBS=jobs)
    return {name: Trained(**torch.load(jobs.with_name(f"{name}.pt"))) for name in LAYOUTS}


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_train_as_one(two_ranks: dict[str, Trained], folder: Path, name: str) -> None:
    expected = alone(folder, json.dumps(config(folder, LAYOUTS[name])["stages"]))
    assert not torch.equal(expected.weights[0]["projector.newline"], expected.weights[1]["projector.newline"])
    check_same(two_ranks[name], expected)
