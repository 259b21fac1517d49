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

BATCH = {"global_batch_size": 4, "micro_batch_size": 1, "sequence_length": 96, "max_images": 2}  # 96: as long with SP
SKIPPING = {"name": "skipping", "freeze": ["vision"], "steps": 4, "batch": BATCH, "lds": {**BERNOULLI, "granularity": "microbatch"}}
STAGES = (SKIPPING, {**DENSE, "batch": BATCH})
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {TP: 2},
    "TP2 SP": {TP: 2, "sequence_parallel": True},
    "PP2": {PP: 2},
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
    return train_alone(config(folder, precision, {}))


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


def test_measure(folder: Path, two_ranks: dict[str, Trained]) -> None:
    for scaling in SCALINGS:
        one, exact = alone(folder, scaling), alone(folder, None)
        print(scaling, "fp8-fp32", apart(one.losses, exact.losses), apart(one.grad_norms, exact.grad_norms), one.losses)
        for name in LAYOUTS:
            found = two_ranks[f"{name} {scaling}"]
            print(name, scaling, apart(found.losses, one.losses), apart(found.grad_norms, one.grad_norms))
    outer = alone(folder, "tensorwise", 1)
    print("outer", apart(outer.losses, alone(folder, None).losses), apart(two_ranks["PP2 outer"].losses, outer.losses))
