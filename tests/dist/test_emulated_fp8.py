"""Training in emulated FP8, with skipped layers: every layout as one rank, and as plain fp32 but for FP8's rounding."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.ladder import BERNOULLI, DENSE, Trained, Written, train_alone, train_layouts, write_inputs, written_run
from tests.dist.launch import run_ranks

pytestmark = pytest.mark.timeout(300)  # the first test trains all layouts

BATCH = {
    "global_batch_size": 4,
    "micro_batch_size": 1,
    "sequence_length": 64,
    "max_images": 2,
}  # 64: as long with SP and CP
SKIPPING = {
    "name": "skipping",
    "freeze": ["vision"],
    "steps": 4,
    "batch": BATCH,
    "lds": {**BERNOULLI, "granularity": "microbatch"},
}
STAGES = (SKIPPING, {**DENSE, "batch": BATCH})
TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {TP: 2},
    "TP2 SP": {TP: 2, "sequence_parallel": True},
    "PP2": {PP: 2},
    "CP2": {CP: 2},
}
SCALINGS = ("tensorwise", "rowwise")


def config(folder: Path, precision: Written, layout: Written) -> Written:
    written = written_run(folder, *STAGES, model="aligned", **layout)
    return {**written, "precision": precision}


def emulated(scaling: str, **settings: object) -> Written:
    return {"fp8": "emulate", "emulated_scaling": scaling, **settings}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("emulated")
    write_inputs(path, ["aligned"])
    return path


@functools.cache
def alone(folder: Path, scaling: str | None, first_last: int = 0) -> Trained:
    precision = {} if scaling is None else emulated(scaling, first_last_layers_bf16=first_last)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of two ranks has: sums in another order may round to other FP8 numbers
    try:
        return train_alone(config(folder, precision, {}))
    finally:
        torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[str, Trained]:
    configs = {
        f"{name} {scaling}": config(folder, emulated(scaling), layout)
        for name, layout in LAYOUTS.items()
        for scaling in SCALINGS
    }
    configs["PP2 outer"] = config(folder, emulated("tensorwise", first_last_layers_bf16=1), {PP: 2})
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps(configs))
    run_ranks(train_layouts, 2, 240, JOBS=jobs)
    return {name: Trained(**torch.load(jobs.with_name(f"{name}.pt"))) for name in configs}


def apart(found: list[float], other: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, other, strict=True))


@pytest.mark.parametrize("scaling", SCALINGS)
def test_fp8_shows_in_the_losses(folder: Path, scaling: str) -> None:
    found, exact = alone(folder, scaling), alone(folder, None)
    # Measured 5e-3 and 7e-3: less would mean that hardly a layer rounds, more that it loses more than FP8's digits.
    assert 1e-3 < apart(found.losses, exact.losses) < 3e-2
    assert found.masks == exact.masks


def test_outer_layers_stay_as_they_are(folder: Path, two_ranks: dict[str, Trained]) -> None:
    outer, found = alone(folder, "tensorwise", 1), two_ranks["PP2 outer"]
    assert outer.losses[0] != alone(folder, "tensorwise").losses[0]
    assert outer.losses[0] != alone(folder, None).losses[0]
    # The same layers on two stages: what no update has reached yet is equal to the last bit.
    assert found.losses[0] == outer.losses[0]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_train_as_one(folder: Path, two_ranks: dict[str, Trained], layout: str, scaling: str) -> None:
    found, expected = two_ranks[f"{layout} {scaling}"], alone(folder, scaling)
    assert found.masks == expected.masks
    rounding = apart(expected.losses, alone(folder, None).losses)
    if layout.startswith(("TP2", "CP2")) and scaling == "tensorwise":
        # Each rank's shard of a weight, or its tokens, have a scale of their own: differently rounded, not worse. Measured 1.1 of it.
        assert apart(found.losses, expected.losses) <= 2 * rounding
        return
    # Powers of two as scales round alike in shards: 5 x the 3e-8 measured, before an update has made anything of it.
    assert apart(found.losses[:1], expected.losses[:1]) <= 1.5e-7
    # Later a last bit can decide how a number is rounded to FP8, and the next update spreads it: seen to make 4e-4 of the
    # loss on one CPU, and on another (with AMX) nothing in three steps, then up to 2.1e-3. Less than what FP8 itself does.
    assert apart(found.losses, expected.losses) <= rounding
