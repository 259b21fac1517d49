"""Models beside LLaVA on Llama train in parallel layouts as on one rank: SigLIP, biased QKV and scaled RoPE, split over ranks;
and a Hugging Face tower with a Q-Former and a linear projector, whole on tensor-parallel ranks."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.ladder import (
    ALIGNMENT,
    DENSE,
    Trained,
    Written,
    train_alone,
    train_layouts,
    write_inputs,
    written_run,
)
from tests.dist.launch import run_ranks
from tests.dist.test_parity import ALL_OVERLAP, LOSS_RTOL, PP, TP, check_same, relative

pytestmark = pytest.mark.timeout(300)  # the first test trains all layouts

RUNS: dict[str, dict[str, Any]] = {
    "siglip": {"model": "siglip"},
    "qformer": {"model": "qformer"},
    "fresh": {"model": "qformer", "fresh": True},
}
LAYOUTS: dict[str, tuple[str, dict[str, object]]] = {
    "TP2 SP siglip": ("siglip", {TP: 2, "sequence_parallel": True}),
    "PP2 siglip": ("siglip", {PP: 2}),
    "TP2 SP qformer": ("qformer", {TP: 2, "sequence_parallel": True}),
    "PP2 qformer": ("qformer", {PP: 2}),
    "DP2 all overlap qformer": ("qformer", ALL_OVERLAP),
    "CP2 qformer": ("qformer", {"context_parallel_size": 2, **ALL_OVERLAP}),
    "TP2 fresh": ("fresh", {TP: 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("architectures")
    write_inputs(path, ("siglip", "qformer"))
    return path


def config(folder: Path, run: str, layout: dict[str, object]) -> Written:
    return written_run(folder, ALIGNMENT, DENSE, **RUNS[run], **layout)


@functools.cache
def alone(folder: Path, run: str) -> Trained:
    return train_alone(config(folder, run, {}))


@pytest.fixture(scope="module")
def two_ranks(folder: Path) -> dict[str, Trained]:
    jobs = folder / "jobs.json"
    jobs.write_text(json.dumps({name: config(folder, run, layout) for name, (run, layout) in LAYOUTS.items()}))
    run_ranks(train_layouts, 2, 240, JOBS=jobs)
    return {name: Trained(**torch.load(jobs.with_name(f"{name}.pt"))) for name in LAYOUTS}


@pytest.mark.parametrize("name", [name for name, (run, _) in LAYOUTS.items() if run != "fresh"])
def test_two_ranks_train_as_one(two_ranks: dict[str, Trained], folder: Path, name: str) -> None:
    check_same(two_ranks[name], alone(folder, LAYOUTS[name][0]))


def test_what_ranks_hold_whole_starts_equal(two_ranks: dict[str, Trained], folder: Path) -> None:
    """Random weights of a replicated tower and Q-Former, which ``gather_weights`` compares between ranks.

    Biases of keys start at zero and get gradients of pure rounding, so no weights are compared with one rank's.
    """
    assert relative(two_ranks["TP2 fresh"].losses, alone(folder, "fresh").losses) <= LOSS_RTOL
