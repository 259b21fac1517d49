"""One rank of a model copy reads for all of it: any layout trains on packed and compressed rows as one rank does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.ladder import BATCH, Trained, Written, train_layouts, write_inputs, written_run
from tests.dist.launch import run_ranks

# test_parity.py explains these: rounding of sums in another order, a few steps long.
LOSS_RTOL, WEIGHT_ULPS = 2e-6, 5 * 1.5

VTC = {"keep_ratio": 1.0, "schedule": "linear", "final_keep_ratio": 0.25, "full_every": 3}
STAGES: tuple[Written, ...] = (
    {"name": "packed", "freeze": ["vision"], "steps": 4, "vtc": {**VTC, "sampler": "random"},
     "batch": {**BATCH, "sequence_length": 96, "packing": "pack"}},
    {"name": "short", "steps": 3, "vtc": {"keep_ratio_by_image": [1.0, 0.25], "positions": "compact"},
     "batch": {**BATCH, "packing": "none"}},
    {"name": "anchored", "freeze": ["vision"], "steps": 3, "vtc": {"sampler": "anchored", "keep_ratio": 0.5, "full_every": 3},
     "batch": {**BATCH, "sequence_length": 96, "packing": "pack"}},
    {"name": "guided", "freeze": ["vision", "language"], "steps": 2, "vtc": {"sampler": "guided", "keep_ratio_by_image": [0.5, 0.25]}},
    {"name": "pooled", "steps": 2, "vtc": {"sampler": "pooled", "keep_ratio": 0.25}},
)  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2 SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2},
    "PP2 VPP2": {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2},
    "PP2 full recompute": {"pipeline_model_parallel_size": 2, "recompute": "full"},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    folder = tmp_path_factory.mktemp("sharing")
    write_inputs(folder)
    found = {}
    for num_ranks, layouts in ((1, {"one": {}}), (2, LAYOUTS)):
        jobs = folder / f"jobs{num_ranks}.json"
        jobs.write_text(json.dumps({name: written_run(folder, *STAGES, **layout) for name, layout in layouts.items()}))
        run_ranks(train_layouts, num_ranks, 200, JOBS=jobs)
        found |= {name: Trained(**torch.load(folder / f"{name}.pt", weights_only=True)) for name in layouts}
    return found


@pytest.mark.timeout(400)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_train_alike(trained: dict[str, Trained], name: str) -> None:
    one, other = trained["one"], trained[name]
    assert other.losses == pytest.approx(one.losses, rel=LOSS_RTOL)
    for before, after in zip(one.weights, other.weights, strict=True):
        for key, weight in before.items():
            ulp = weight.abs().max() * torch.finfo(torch.float32).eps
            assert (after[key] - weight).abs().max() <= WEIGHT_ULPS * ulp, key


def test_the_steps_have_different_shapes(trained: dict[str, Trained], tmp_path: Path) -> None:
    from tests.dist.ladder import resolved_run

    write_inputs(tmp_path)
    packed, short, *_ = resolved_run(written_run(tmp_path, *STAGES), 1).stages
    assert [packed.tokens(step).of_image(0) for step in range(4)] == [16, 13, 16, 7]
    assert [short.tokens(0).of_image(number) for number in range(2)] == [16, 4]
