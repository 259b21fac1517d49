"""A skipped layer costs nothing: no kernel, no saved activation, no byte between ranks, whatever else is switched on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_sts.data.batch import Batch
from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask
from megatron_sts.mcore import groups
from megatron_sts.mcore.weights import named_weights
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.stage import Stage, build_stage
from megatron_sts.train.step import train_step
from tests.dist.ladder import NUM_LAYERS, SKIPPING, Written, resolved_run, write_inputs, written_run
from tests.dist.launch import run_ranks

BYTES_RTOL = 0.02
"""Buckets are padded: measured below 1 %. Kernels and activations are compared exactly."""


class Spent(TorchDispatchMode):
    """Counts kernels, and bytes handed to collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.num_kernels = 0
        self.sent_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = (leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
            self.sent_bytes += max((tensor.nbytes for tensor in tensors), default=0)  # whole; the others are its shards
        else:
            self.num_kernels += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class GivenBatches:
    """In place of a stage's data, which are read once, in order."""

    batches: list[Batch]
    wait_s: float = 0.0
    balanced: None = None

    def step(self, step: int) -> list[Batch]:
        return self.batches


@dataclass(frozen=True)
class GivenMasks:
    """In place of a mask plan."""

    rows: tuple[tuple[bool, ...], ...]

    def mask(self, step: int) -> SkipMask:
        return SkipMask(0, step, self.rows)

    def residual_scales(self, step: int) -> None:
        return None


def given(stage: Stage, *rows: Sequence[int]) -> Stage:
    """The stage with these layers skipped, in every micro-batch alike or in each (a row a micro-batch)."""
    layers = range(stage.num_layers)
    return replace(stage, masks=GivenMasks(tuple(tuple(layer in row for layer in layers) for row in rows)))


def spend(stage: Stage) -> tuple[int, int, int]:
    """Kernels, bytes saved for backward and bytes communicated in one step."""
    weights = {p.untyped_storage().data_ptr() for chunk in stage.chunks for p in chunk.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage
        return tensor

    with Spent() as spent, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        train_step(stage, 0)
    return spent.num_kernels, sum(storage.nbytes() for storage in saved.values()), spent.sent_bytes


def prepared(written: Written, world_size: int = 1) -> Stage:
    resolved = resolved_run(written, world_size)
    place, gate = groups.initialize(resolved.config.parallel, resolved.config.seed), SkipGate()
    stage = build_stage(resolved, resolved.stages[0], place, build_model(resolved, gate), gate)
    stage = replace(stage, batches=GivenBatches(stage.batches.step(0)))  # type: ignore[arg-type]
    for _ in range(2):  # DDP learns in the first step which gradients to wait for
        train_step(given(stage, []), 0)
    return stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spent")
    write_inputs(path)
    return path


def written_with(folder: Path, num_layers: int, **parallel: object) -> Written:
    written = written_run(folder, {**SKIPPING, "freeze": ["vision"], "lds": {}}, **parallel)
    written["model"]["language"] |= {"num_layers": num_layers, "init": None}
    return written


def alone(written: Written, *masks: Sequence[int]) -> list[tuple[int, int, int]]:
    with process_group(60.0):
        stage = prepared(written)
        # The second of two such steps: the first empties the gradients that the one before it left.
        spent = [[spend(given(stage, mask)) for _ in range(2)][-1] for mask in masks]
        groups.destroy()
    return spent


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_kernels_and_activations_are_those_of_the_layers_that_run(folder: Path, recompute: str) -> None:
    masks = [[], [1], [1, 2], [0, 1, 2, 3]]
    spent = alone(written_with(folder, NUM_LAYERS, recompute=recompute), *masks)
    (all_kernels, all_saved, _), (no_kernels, no_saved, _) = spent[0], spent[-1]
    assert all_kernels > no_kernels > 0 and all_saved > no_saved > 0
    for mask, (kernels, saved, _) in zip(masks, spent, strict=True):
        num_run = NUM_LAYERS - len(mask)
        assert (kernels - no_kernels) * NUM_LAYERS == (all_kernels - no_kernels) * num_run
        assert (saved - no_saved) * NUM_LAYERS == (all_saved - no_saved) * num_run


def test_a_model_without_its_layers_costs_what_a_smaller_one_does(folder: Path) -> None:
    """So a skipped layer itself launches nothing and saves nothing."""
    [two] = alone(written_with(folder, 2), [0, 1])
    [four] = alone(written_with(folder, 4), [0, 1, 2, 3])
    assert two[:2] == four[:2]


MICROBATCH_ROWS = [[0, 1], [1], [1, 2], [1, 2, 3]]
"""Layer 1 never runs, layer 3 not in the last micro-batch; each of the others skips some."""


def measure_bytes() -> None:
    """On each of two data-parallel ranks."""
    found = {}
    with process_group(60.0):
        for name, written in json.loads(Path(os.environ["JOBS"]).read_text()).items():
            stage = prepared(written, dist.get_world_size())
            masks = [[rows] for rows in ([], [1], [1, 2], [0, 1, 2, 3])] + [MICROBATCH_ROWS]
            sent = []
            for rows in masks:
                # What a step has left to gather belongs to it.
                sent.append([spend(given(stage, *rows))[2] for _ in range(2)][-1])
            layer = sum(p.numel() for n, p in named_weights(stage.chunks) if n.startswith("language.decoder.layers.0."))
            found[name] = (sent, layer)
            stage.optimizer.close()
            groups.destroy()
    if os.environ["RANK"] == "0":
        Path(os.environ["FOUND"]).write_text(json.dumps(found))


DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "all-reduce": {},
    "overlapped all-reduce": OVERLAP,
    "distributed": DISTRIBUTED,
    "distributed, overlapped": DISTRIBUTED | OVERLAP,
    "distributed, all overlapped": DISTRIBUTED | OVERLAP | {"overlap_param_gather": True},
}


@pytest.fixture(scope="module")
def sent(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("bytes")
    batch = {"global_batch_size": 8, "micro_batch_size": 1, "sequence_length": 72, "max_images": 2}
    jobs = {}
    for name, parallel in LAYOUTS.items():
        written = written_with(folder, NUM_LAYERS, **parallel)
        written["stages"][0]["batch"] = batch
        jobs[name] = written
    (path / "jobs.json").write_text(json.dumps(jobs))
    run_ranks(measure_bytes, 2, 200, JOBS=path / "jobs.json", FOUND=path / "found.json")
    return json.loads((path / "found.json").read_text())


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_between_ranks_are_those_of_the_layers_that_run(sent: dict[str, Any], name: str) -> None:
    (dense, one, two, idle, microbatches), layer = sent[name]
    # fp32 gradients in; with the distributed optimizer fp32 parameters out.
    layer_bytes = layer * 4 * (2 if name.startswith("distributed") else 1)
    assert dense - idle == pytest.approx(NUM_LAYERS * layer_bytes, rel=BYTES_RTOL)
    assert one - idle == pytest.approx(3 * layer_bytes, rel=BYTES_RTOL)
    assert two - idle == pytest.approx(2 * layer_bytes, rel=BYTES_RTOL)
    assert microbatches - idle == pytest.approx(3 * layer_bytes, rel=BYTES_RTOL)
