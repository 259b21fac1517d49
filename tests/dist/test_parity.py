"""Every parallel layout trains as one rank does: losses, gradient norms and updated weights, over all stages.

The stages follow each other: alignment (VTC, only the projector learns), fine-tuning with skipped layers (LDS), dense
training of everything. Samples have no, one or two images; on two data-parallel ranks some steps show one rank none.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.ladder import (
    BERNOULLI,
    DENSE,
    Trained,
    Written,
    resolved_run,
    train_alone,
    train_layouts,
    write_inputs,
    written_run,
)
from tests.dist.launch import run_ranks

# Each is 5 x the largest difference measured over all layouts. fp32 sums in another order (slices of a matrix product, of
# a norm, of a batch) differ in the last bits. Losses differ most between micro-batches of 1 and of 4; norms where a large
# tensor's squares are summed in two parts (TP2, tied embeddings). What reaches a weight is one rounding or two of the weight
# itself, so weights are compared in units in the last place of a tensor's largest element; a step moves it by thousands.
LOSS_RTOL, NORM_RTOL, WEIGHT_ULPS = 5 * 1.3e-7, 5 * 1.8e-6, 5 * 1.5
# bf16 keeps 8 bits, and TP2 rounds two partial sums to them before they meet (PP2: no difference but in the norm).
BF16_LOSS_RTOL, BF16_NORM_RTOL = 5 * 3.8e-4, 5 * 4.4e-3

pytestmark = pytest.mark.timeout(300)  # the first test of a number of ranks trains all its layouts

FREEZE = {"name": "freeze", "freeze": ["vision"], "steps": 4, "lds": {**BERNOULLI, "skipped_update": "freeze"}}
ZERO_GRAD = {**FREEZE, "name": "zero_grad", "lds": {**BERNOULLI, "skipped_update": "zero_grad"}}
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
VPP = "virtual_pipeline_model_parallel_size"
ALL_OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "use_distributed_optimizer": True}

# What is trained, by name: stages and model; each is also trained on one rank, to compare with.
RUNS: dict[str, dict[str, Any]] = {
    "all": {},
    "tied": {"stages": (DENSE,), "model": "tied"},
    "skipped updates": {"stages": (FREEZE, ZERO_GRAD)},
    "bf16": {"params": "bf16"},
}
ONE_RANK = {
    "recompute full": ("all", {"recompute": "full"}),
    "recompute selective": ("all", {"recompute": "selective"}),
}
TWO_RANKS = {
    "TP2": ("all", {TP: 2}),
    "TP2 SP": ("all", {TP: 2, "sequence_parallel": True}),
    "PP2": ("all", {PP: 2}),
    "PP2 VPP2": ("all", {PP: 2, VPP: 2}),
    "PP2 uneven": ("all", {PP: 2, "layout": [3, 1]}),
    "PP2 VPP2 uneven": ("all", {PP: 2, VPP: 2, "layout": [1, 2, 0, 1]}),
    "PP2 VPP2 embedding and head alone": ("all", {PP: 2, VPP: 2, "layout": [0, 1, 3, 0]}),
    "DP2": ("all", {"use_distributed_optimizer": True}),
    "DP2 overlap": ("all", {"overlap_grad_reduce": True}),
    "DP2 distributed overlap": ("all", {"overlap_grad_reduce": True, "use_distributed_optimizer": True}),
    "DP2 all overlap": ("all", ALL_OVERLAP),
    "PP2 tied": ("tied", {PP: 2}),
    "TP2 tied": ("tied", {TP: 2}),
    "DP2 skipped updates": ("skipped updates", {"use_distributed_optimizer": True}),
    "DP2 all overlap skipped updates": ("skipped updates", ALL_OVERLAP),
    "bf16 TP2": ("bf16", {TP: 2}),
    "bf16 PP2": ("bf16", {PP: 2}),
    "bf16 CP2": ("bf16", {"context_parallel_size": 2}),
    "TP2 again": ("all", {TP: 2}),
}
FOUR_RANKS = {
    "TP2 PP2": ("all", {TP: 2, PP: 2}),
    "PP4": ("all", {PP: 4}),  # the LDS stage skips all layers of both middle stages
}
LAYOUTS = {1: ONE_RANK, 2: TWO_RANKS, 4: FOUR_RANKS}


@functools.cache
def folder() -> Path:
    """Samples and weights; kept until the interpreter ends."""
    path = Path(tempfile.mkdtemp(prefix="parity"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    write_inputs(path, ("plain", "tied"))
    return path


def config(run: str, layout: dict[str, object]) -> Written:
    settings = dict(RUNS[run])
    return written_run(folder(), *settings.pop("stages", ()), **settings, **layout)


@functools.cache
def alone(run: str) -> Trained:
    return train_alone(config(run, {}))


@pytest.fixture(scope="module")
def one_rank() -> dict[str, Trained]:
    return trained(1)


@pytest.fixture(scope="module")
def two_ranks() -> dict[str, Trained]:
    return trained(2)


@pytest.fixture(scope="module")
def four_ranks() -> dict[str, Trained]:
    return trained(4)


def trained(num_ranks: int) -> dict[str, Trained]:
    """All layouts of so many ranks, trained in the same processes one after the other."""
    configs = {name: config(run, layout) for name, (run, layout) in LAYOUTS[num_ranks].items()}
    if num_ranks == 1:
        return {name: train_alone(written) for name, written in configs.items()}
    jobs = folder() / str(num_ranks) / "jobs.json"
    jobs.parent.mkdir()
    jobs.write_text(json.dumps(configs))
    run_ranks(train_layouts, num_ranks, 240, JOBS=jobs)
    return {name: Trained(**torch.load(jobs.with_name(f"{name}.pt"))) for name in configs}


def relative(found: list[float], expected: list[float]) -> float:
    assert len(found) == len(expected)
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def ulps(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / (torch.finfo(torch.float32).eps * expected.abs().max()))


def differences(found: Trained, expected: Trained) -> tuple[float, float, dict[str, float]]:
    """Of losses and norms, relative; of each weight after each stage, in units in the last place."""
    weights: dict[str, float] = {}
    for of_found, of_expected in zip(found.weights, expected.weights, strict=True):
        assert of_found.keys() == of_expected.keys()
        for name, weight in of_expected.items():
            weights[name] = max(weights.get(name, 0.0), ulps(of_found[name], weight))
    return (
        relative(found.losses, expected.losses),
        relative(found.grad_norms, expected.grad_norms),
        weights,
    )


def check_same(found: Trained, expected: Trained) -> None:
    loss, norm, weights = differences(found, expected)
    print(f"loss {loss:.1e}, norm {norm:.1e}, weights {max(weights.values()):.2f} ulps")
    assert loss <= LOSS_RTOL
    assert norm <= NORM_RTOL
    assert {name: ulp for name, ulp in weights.items() if ulp > WEIGHT_ULPS} == {}
    assert found.masks == expected.masks


def check_bit_equal(found: Trained, expected: Trained) -> None:
    assert (found.losses, found.grad_norms) == (expected.losses, expected.grad_norms)
    for of_found, of_expected in zip(found.weights, expected.weights, strict=True):
        different = [name for name, weight in of_expected.items() if not torch.equal(of_found[name], weight)]
        assert of_found.keys() == of_expected.keys() and not different


def cases(num_ranks: int) -> pytest.MarkDecorator:
    names = [name for name in LAYOUTS[num_ranks] if not name.startswith("bf16")]
    return pytest.mark.parametrize("name", names)


def test_training_moves_what_it_should_and_some_rank_sees_no_image() -> None:
    start, aligned, skipped, dense = alone("all").weights
    moved = [{name for name in start if not torch.equal(a[name], b[name])} for a, b in
             ((start, aligned), (aligned, skipped), (skipped, dense))]  # fmt: skip
    assert moved[0] == {name for name in start if name.startswith("projector.")}
    idle = tuple(f"language.decoder.layers.{layer}." for layer in (1, 2))
    assert moved[1] == {name for name in start if not name.startswith(("vision.", *idle))}
    assert moved[2] == set(start)
    images = images_by_rank()
    assert any(0 in step and any(step) for step in images), images


def images_by_rank() -> list[list[int]]:
    """Images that each of two data-parallel ranks sees in each step of the ladder's first two stages."""
    from megatron_sts.mcore.groups import Place
    from megatron_sts.train.feed import Feed

    resolved = resolved_run(config("all", {}), world_size=2)
    places = [Place(tp_rank=0, tp_size=1, pp_rank=0, pp_size=1, dp_rank=rank, dp_size=2) for rank in range(2)]
    images = []
    for spec in resolved.stages:
        feeds = [Feed(resolved, spec, place) for place in places]
        for step in range(spec.num_steps):
            images.append([sum(batch.load.num_images for batch in feed.step(step).batches) for feed in feeds])
    return images


@cases(1)
def test_recomputation_changes_nothing(one_rank: dict[str, Trained], name: str) -> None:
    check_bit_equal(one_rank[name], alone("all"))


def test_one_micro_batch_of_four_is_four_of_one() -> None:
    written = config("all", {})
    stages = [{**stage, "batch": {**stage["batch"], "micro_batch_size": 4}} for stage in written["stages"]]
    check_same(train_alone({**written, "stages": stages}), alone("all"))


@cases(2)
def test_two_ranks_train_as_one(two_ranks: dict[str, Trained], name: str) -> None:
    check_same(two_ranks[name], alone(TWO_RANKS[name][0]))


@cases(4)
def test_four_ranks_train_as_one(four_ranks: dict[str, Trained], name: str) -> None:
    check_same(four_ranks[name], alone(FOUR_RANKS[name][0]))


def test_nothing_is_left_of_earlier_layouts(two_ranks: dict[str, Trained]) -> None:
    check_bit_equal(two_ranks["TP2 again"], two_ranks["TP2"])


def test_ranks_with_other_string_hashes_train_alike(two_ranks: dict[str, Trained]) -> None:
    """Fresh interpreters, in which sets of strings have other orders on each rank; ranks that are forked share one order."""
    names = ["TP2 SP", "DP2 all overlap"]
    jobs = folder() / "hashes" / "jobs.json"
    jobs.parent.mkdir()
    jobs.write_text(json.dumps({name: config(*TWO_RANKS[name]) for name in names}))
    run_ranks(train_layouts, 2, 240, JOBS=jobs, PYTHONHASHSEED="random")
    for name in names:
        check_bit_equal(Trained(**torch.load(jobs.with_name(f"{name}.pt"))), two_ranks[name])


@pytest.mark.parametrize("name", ["bf16 TP2", "bf16 PP2", "bf16 CP2"])
def test_bf16_is_close(two_ranks: dict[str, Trained], name: str) -> None:
    loss, norm, weights = differences(two_ranks[name], alone("bf16"))
    print(f"loss {loss:.1e}, norm {norm:.1e}, weights {max(weights.values()):.2f} ulps of fp32")
    assert loss <= BF16_LOSS_RTOL and norm <= BF16_NORM_RTOL
    assert all(weight.isfinite().all() for weight in two_ranks[name].weights[-1].values())
