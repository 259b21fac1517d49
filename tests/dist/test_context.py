"""Context parallelism trains as one rank does, with every other axis, sampler and schedule, and its attention is exact.

The stages follow each other: samplers that choose before and after the projector, with positions that follow the choice to
other stages and without; layers that are skipped, by themselves and by rounds; rows as long as the step's longest; a tower
that learns; packed rows, in which each sample is cut by itself. Samples have no, one or two images, so that some rows end in padding and some pieces of a row hold no text.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType

from megatron_sts.config.resolve import Resolved
from megatron_sts.config.schema import ParallelConfig
from megatron_sts.data.packing import describe_packing
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups, specs
from megatron_sts.mcore.attention import AllGatherAttention, SdpaCoreAttention
from megatron_sts.mcore.context import own_tokens, whole_rows
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from tests.dist.ladder import (
    BATCH,
    BERNOULLI,
    Trained,
    Written,
    resolved_run,
    train_alone,
    train_jobs,
    write_inputs,
    written_run,
)
from tests.dist.launch import run_ranks
from tests.dist.test_parity import ALL_OVERLAP, PP, TP, VPP, check_same

pytestmark = pytest.mark.timeout(400)  # the first test of a number of ranks trains all its layouts

CP = "context_parallel_size"
ROUNDS = {"sampler": "rounds", "rounds": 2, "alpha": 0.5, "epsilon": 0.5, "schedule": "constant"}
STAGES: tuple[Written, ...] = (
    {"name": "guided", "freeze": ["vision", "language"], "steps": 2, "vtc": {"sampler": "guided", "keep_ratio": 0.5}},
    {"name": "random", "freeze": ["vision"], "steps": 2, "lds": BERNOULLI,
     "vtc": {"sampler": "random", "keep_ratio": 0.5, "positions": "compact"}, "batch": {**BATCH, "packing": "none"}},
    {"name": "anchored", "freeze": ["vision"], "steps": 2, "lds": ROUNDS, "vtc": {"sampler": "anchored", "keep_ratio": 0.25}},
    {"name": "pooled", "steps": 2, "vtc": {"sampler": "pooled", "keep_ratio": 0.25}},
)  # fmt: skip
PACKED: Written = {"name": "packed", "freeze": ["vision"], "steps": 2, "vtc": {"sampler": "uniform", "keep_ratio": 0.5},
                   "batch": {**BATCH, "sequence_length": 96, "packing": "pack"}}  # fmt: skip
"""Last, as two data-parallel ranks pack other samples than one does."""
EVERYTHING: tuple[Written, ...] = (
    {
        "name": "skipping",
        "freeze": ["vision"],
        "steps": 2,
        "lds": BERNOULLI,
        "vtc": {"sampler": "random", "keep_ratio": 0.5},
    },
    {"name": "whole", "steps": 2},
)
"""For other models: what every layout has to get right of them is in whole rows, with all that learns, too."""
OTHER_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "CP2 PP2 tied": ("tied", {CP: 2, PP: 2}),
    "CP2 TP2 tied": ("tied", {CP: 2, TP: 2}),
    "CP2 TP2 SP Q-Former": ("qformer", {CP: 2, TP: 2, "sequence_parallel": True}),
}
"""A word embedding on the first and the last stage, whose gradients are those of all context-parallel ranks; queries that read images."""
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    2: {"CP2": {CP: 2}},
    4: {
        "CP4 full recompute": {CP: 4, "recompute": "full"},
        "CP2 TP2 SP selective recompute": {CP: 2, TP: 2, "sequence_parallel": True, "recompute": "selective"},
        "CP2 PP2 VPP2 overlap": {CP: 2, PP: 2, VPP: 2, "overlap_grad_reduce": True},
        "CP2 DP2 all overlap": {CP: 2, **ALL_OVERLAP},
    },
}
NAMES = [(num_ranks, name) for num_ranks, layouts in LAYOUTS.items() for name in layouts]
ATTENTION_RTOL = 2e-6
"""Of the largest element, in fp32: softmax and products of 32 keys, in other blocks; measured 3.6e-7."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("context")
    write_inputs(path, ["plain", *{model for model, _ in OTHER_MODELS.values()}])
    return path


@pytest.fixture(scope="module")
def one_rank(folder: Path) -> Trained:
    return train_alone(written_run(folder, *STAGES, PACKED), with_room)


def with_room(written: Written, world_size: int) -> Resolved:
    """With the same padding behind packed samples for any number of context-parallel ranks up to four."""
    resolved = resolved_run(written, world_size)
    stages = tuple(stage.model_copy(update={"sample_multiple": 8}) for stage in resolved.stages)
    return resolved.model_copy(update={"stages": stages})


def stages_of(name: str) -> tuple[Written, ...]:
    return STAGES if "DP2" in name else (*STAGES, PACKED)


@pytest.fixture(scope="module")
def trained(folder: Path) -> dict[str, Trained]:
    found = {}
    for num_ranks, layouts in LAYOUTS.items():
        jobs = folder / f"jobs{num_ranks}.json"
        written = {name: written_run(folder, *stages_of(name), **layout) for name, layout in layouts.items()}
        if num_ranks == 4:
            for name, (model, layout) in OTHER_MODELS.items():
                written[name] = written_run(folder, *EVERYTHING, model=model, **layout)
        jobs.write_text(json.dumps(written))
        run_ranks(on_ranks, num_ranks, 300, JOBS=jobs)
        found |= {name: Trained(**torch.load(folder / f"{name}.pt")) for name in written}
    return found


@pytest.mark.parametrize(("num_ranks", "name"), NAMES)
def test_context_parallel_ranks_train_as_one(
    trained: dict[str, Trained], one_rank: Trained, num_ranks: int, name: str
) -> None:
    num_steps, num_stages = sum(stage["steps"] for stage in stages_of(name)), len(stages_of(name))
    one = [getattr(one_rank, each)[:num_steps] for each in ("losses", "grad_norms", "lrs", "masks")]
    check_same(trained[name], Trained(*one, weights=one_rank.weights[: num_stages + 1]))


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_tied_embeddings_and_queries_train_as_on_one_rank(folder: Path, trained: dict[str, Trained], name: str) -> None:
    check_same(trained[name], other_alone(folder, OTHER_MODELS[name][0]))


@functools.cache
def other_alone(folder: Path, model: str) -> Trained:
    return train_alone(written_run(folder, *EVERYTHING, model=model), with_room)


def on_ranks() -> None:
    """On each rank: what needs the groups alone, then the training of all layouts."""
    with process_group(60.0):
        size = dist.get_world_size()
        groups.initialize(ParallelConfig(context_parallel_size=size), seed=0)
        check_order(size)
        check_attention(size)
        groups.destroy()
        if size == 2:
            check_refusal()
        train_jobs(with_room)


def check_order(size: int) -> None:
    rows = torch.arange(2 * 8 * size).view(2, -1)
    own, rank = own_tokens(rows, 1, None), dist.get_rank()
    assert own[0].tolist() == [*range(4 * rank, 4 * rank + 4), *range(8 * size - 4 * rank - 4, 8 * size - 4 * rank)]
    assert torch.equal(whole_rows(own, dim=1), rows)
    assert torch.equal(whole_rows(own.T, dim=0), rows.T)
    if size == 2:
        segments = torch.tensor([[1] * 8 + [2] * 4 + [0] * 4, [3] * 16])
        expected = [[0, 1, 6, 7, 8, 11, 12, 15], [0, 1, 2, 3, 12, 13, 14, 15]]
        others = [[2, 3, 4, 5, 9, 10, 13, 14], [4, 5, 6, 7, 8, 9, 10, 11]]
        assert own_tokens(torch.arange(16).expand(2, 16), 1, describe_packing(segments, 2)).tolist() == (
            others if rank else expected
        )


def check_attention(size: int) -> None:
    """Outputs and gradients of queries, keys and values, grouped, against the whole rows' on one rank."""
    config: Any = SimpleNamespace(attention_dropout=0.0)
    groups_of_ranks = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
    across = AllGatherAttention(config, 1, attn_mask_type=AttnMaskType.causal, pg_collection=groups_of_ranks)
    alone = SdpaCoreAttention(config, 1, AttnMaskType.causal)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(32, 2, heads, 8, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    weight = torch.randn(32, 2, 32, generator=generator)
    expected = alone(*whole)
    (expected * weight).sum().backward()
    own = [own_tokens(tensor.detach(), 0, None).requires_grad_() for tensor in whole]
    found = across(*own)
    (found * own_tokens(weight, 0, None)).sum().backward()
    pairs = [(found, expected), *((mine.grad, of_all.grad) for mine, of_all in zip(own, whole, strict=True))]
    for mine, of_all in pairs:
        assert mine is not None and of_all is not None
        difference = (mine - own_tokens(of_all, 0, None)).abs().max() / of_all.abs().max()
        print(f"attention over {size} ranks: {difference:.1e}")
        assert difference < ATTENTION_RTOL


def check_refusal() -> None:
    """A core attention that would see its own rank's tokens alone does not get into a model."""
    resolved = resolved_run(json.loads(Path(os.environ["JOBS"]).read_text())["CP2"], 2)
    groups.initialize(resolved.config.parallel, seed=0)
    with (
        replaced_attention(),
        pytest.raises(ValueError, match="SdpaCoreAttention attends over the tokens of 1 ranks, but"),
    ):
        build_model(resolved, SkipGate())
    groups.destroy()


@contextmanager
def replaced_attention() -> Iterator[None]:
    specs.AllGatherAttention = SdpaCoreAttention  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        specs.AllGatherAttention = AllGatherAttention  # type: ignore[misc]
