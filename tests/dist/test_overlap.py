"""Skipping under every way to reduce gradients and gather parameters trains to the weights of plain torch.

{plain, overlapped, distributed optimizer, both, both with overlapped gathers} x {DP2, PP2 x DP2, PP2 x VPP2 x DP2, PP2 x
VPP4 x DP2 with a layer a round, so that most steps drop rounds} x {a mask a step, a mask a micro-batch} x {no, selective,
full recomputation}: 42 runs of ten steps, a third, which hold every combination of the first three and of every two.
All 120: ``OVERLAP_COMBINATIONS=all pytest tests/dist/test_overlap.py``.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sts.lds.mask import SkipMask, draw_mask
from megatron_sts.lds.placement import placement
from tests.dist.ladder import NUM_LAYERS, Written, resolved_run, train_layouts, write_inputs, written_run
from tests.dist.launch import run_ranks
from tests.dist.plain import State, train_plainly

pytestmark = pytest.mark.timeout(900)  # the first test trains all runs of its number of ranks

NUM_STEPS, NUM_COPIES = 10, 2
# Four micro-batches a rank. Over the run each layer is idle in some steps, and misses the last micro-batch in others.
BATCH = {"global_batch_size": 8, "micro_batch_size": 1, "sequence_length": 72, "max_images": 2}
LDS = {"alpha": 0.75, "epsilon": 0.2, "schedule": "constant"}
# 4 x the largest difference measured over all runs: ten steps of the rounding that tests/dist/test_parity.py explains.
WEIGHT_ULPS = 4 * 2.25

DISTRIBUTED, OVERLAP = {"use_distributed_optimizer": True}, {"overlap_grad_reduce": True}
REDUCTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "overlap": OVERLAP,
    "distributed": DISTRIBUTED,
    "distributed-overlap": DISTRIBUTED | OVERLAP,
    "distributed-overlap-gather": DISTRIBUTED | OVERLAP | {"overlap_param_gather": True},
}
PP, VPP = "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size"
PIPELINES: dict[str, dict[str, Any]] = {
    "PP1": {},
    "PP2": {PP: 2},
    "VPP2": {PP: 2, VPP: 2},
    "VPP4": {PP: 2, VPP: 4, "layout": [1, 0, 0, 1, 1, 0, 0, 1]},  # layer n is round n, on either rank in turn
}
GRANULARITIES = ("step", "microbatch")
RECOMPUTE = ("none", "selective", "full")


Choice = tuple[str, str, str, str]


KINDS = (tuple(REDUCTIONS), tuple(PIPELINES), GRANULARITIES, RECOMPUTE)
RISKIEST = ("distributed-overlap-gather", "VPP4", "microbatch")
"""Where most is in flight at once: with each kind of recomputation."""


def every_choice() -> list[Choice]:
    return list(itertools.product(REDUCTIONS, PIPELINES, GRANULARITIES, RECOMPUTE))


def third() -> list[Choice]:
    """The third in which the other three choices decide the recomputation, so that any one of them meets all of its kinds."""
    return [
        choice
        for choice in every_choice()
        if choice[:3] == RISKIEST or sum(kind.index(one) for kind, one in zip(KINDS, choice, strict=True)) % 3 == 0
    ]


def choices() -> list[Choice]:
    return every_choice() if os.environ.get("OVERLAP_COMBINATIONS") == "all" else third()


def names(pipelines: tuple[str, ...]) -> list[str]:
    return [" ".join(choice) for choice in choices() if choice[1] in pipelines]


def test_the_first_three_choices_and_every_two_meet() -> None:
    for some in ((0, 1, 2), *itertools.combinations(range(4), 2)):
        assert {tuple(c[i] for i in some) for c in third()} == {tuple(c[i] for i in some) for c in every_choice()}


def written_as(folder: Path, name: str) -> Written:
    reduction, pipeline, granularity, recompute = name.split()
    stage = {"name": "finetune", "freeze": ["vision"], "steps": NUM_STEPS, "batch": BATCH}
    layout = {**REDUCTIONS[reduction], **PIPELINES[pipeline], "recompute": recompute}
    return {**written_run(folder, {**stage, "lds": {**LDS, "granularity": granularity}}, **layout), "seed": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("overlap")
    write_inputs(path)
    return path


@functools.cache
def trained(folder: Path, pipelines: tuple[str, ...], num_ranks: int) -> dict[str, dict[str, Any]]:
    jobs = folder / f"jobs{num_ranks}.json"
    jobs.write_text(json.dumps({name: written_as(folder, name) for name in names(pipelines)}))
    run_ranks(train_layouts, num_ranks, 800, JOBS=jobs)
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in names(pipelines)}


@functools.cache
def masks(folder: Path, granularity: str) -> list[SkipMask]:
    resolved = resolved_run(written_as(folder, f"plain PP1 {granularity} none"), NUM_COPIES)
    stage = resolved.stages[0]
    assert stage.config.lds is not None
    return [
        draw_mask(
            stage.config.lds,
            resolved.config.seed,
            0,
            step,
            NUM_STEPS,
            placement(resolved, stage),
            stage.num_microbatches,
        )
        for step in range(NUM_STEPS)
    ]


@functools.cache
def reference(folder: Path, granularity: str, lrs: tuple[float, ...]) -> State:
    written = written_as(folder, f"plain PP1 {granularity} none")
    return train_plainly(written, lrs, masks(folder, granularity), NUM_COPIES)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_the_runs_meet_every_case(folder: Path, granularity: str) -> None:
    drawn = masks(folder, granularity)
    assert {len(mask.rows) for mask in drawn} == {1 if granularity == "step" else 4}
    assert all(sum(mask.idle[layer] for mask in drawn) > 0 for layer in range(NUM_LAYERS))
    assert all(not all(mask.idle[layer] for mask in drawn) for layer in range(NUM_LAYERS))
    # A layer is a round of VPP4: first, last and inner ones are dropped, all but one too.
    num_units = {NUM_LAYERS - sum(mask.idle) for mask in drawn}
    assert {1, 2} <= num_units if granularity == "step" else {2, 3} <= num_units
    if granularity == "microbatch":
        late = [[mask.rows[-1][layer] and not mask.idle[layer] for layer in range(NUM_LAYERS)] for mask in drawn]
        assert all(map(any, zip(*late, strict=True)))


def check(folder: Path, name: str, found: dict[str, Any]) -> None:
    granularity = name.split()[2]
    assert found["masks"] == [mask.idle for mask in masks(folder, granularity)]
    expected = reference(folder, granularity, tuple(found["lrs"]))
    weights = found["weights"][-1]
    ulps = {key: largest_ulps(weights[key], state["weight"]) for key, state in expected.items()}
    print(f"{name}: {max(ulps.values()):.2f} ulps")
    assert {key: ulp for key, ulp in ulps.items() if ulp > WEIGHT_ULPS} == {}


def largest_ulps(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, in units in the last place of the tensor's largest element."""
    return float((found - expected).abs().max() / (expected.abs().max() * torch.finfo(torch.float32).eps))


@pytest.mark.parametrize("name", names(("PP1",)))
def test_data_parallel_ranks_train_as_plain_torch(folder: Path, name: str) -> None:
    check(folder, name, trained(folder, ("PP1",), 2)[name])


@pytest.mark.parametrize("name", names(("PP2", "VPP2", "VPP4")))
def test_pipelines_train_as_plain_torch(folder: Path, name: str) -> None:
    check(folder, name, trained(folder, ("PP2", "VPP2", "VPP4"), 4)[name])
