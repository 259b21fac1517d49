"""The validation loss is the mean over all tokens of all samples, whatever the layout, the packing and what training skips."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sts.config.resolve import Resolved
from megatron_sts.data.batch import Batch
from megatron_sts.data.collate import collate
from megatron_sts.launch import trail
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.model.init import build_model
from megatron_sts.model.prepare import BatchPreparer
from megatron_sts.runtime.device import current_device
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.held_out import open_samples
from megatron_sts.train.metrics import RunLog
from megatron_sts.train.stage import Stage, build_stage
from megatron_sts.train.step import train_step
from megatron_sts.train.validation import Validator, as_validated
from tests.dist.ladder import Written, resolved_run, write_samples, write_weights, written_run
from tests.dist.launch import run_ranks

# 5 x the largest difference measured over all layouts and packings: fp32 sums in another order, added up in float64.
LOSS_RTOL = 5 * 1e-8
NUM_STEPS = 2
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
STAGE: Written = {
    "name": "one",
    "steps": NUM_STEPS,
    "freeze": ["vision"],
    # Layers 1 and 2 never run, but their weights decay: with the distributed optimizer each rank has half of the new ones.
    "lds": {"sampler": "fixed", "fixed_layers": [1, 2], "skipped_update": "zero_grad"},
    "vtc": {"keep_ratio": 0.5, "sampler": "random"},
    "optimizer": {"lr": 1e-3, "warmup_steps": 1, "weight_decay": 10.0, "eps": 1e-4},
}
ALL_OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True, "use_distributed_optimizer": True}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "TP2 SP": ("pad", {TP: 2, "sequence_parallel": True}),
    "PP2": ("none", {PP: 2}),
    "PP2 VPP2": ("pad", {PP: 2, "virtual_pipeline_model_parallel_size": 2}),
    "PP2 spread": ("pad", {PP: 2, "vision": "spread"}),
    "CP2": ("pad", {"context_parallel_size": 2}),
    "CP2 packed": ("pack", {"context_parallel_size": 2}),
    "PP2 packed": ("pack", {PP: 2}),
    "DP2": ("pad", ALL_OVERLAP),
    "DP2 packed": ("pack", {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is trained on, random weights, and 22 other samples, so that the last micro-batches have less of them than rows, and a
    bad one."""
    folder = tmp_path_factory.mktemp("validation")
    write_samples(folder, 22)
    entries = json.loads((folder / "samples.json").read_text())
    (folder / "held_out.json").write_text(json.dumps([*entries, {"id": "bad", "conversations": []}]))
    write_samples(folder)
    write_weights(folder, "plain")
    return folder


def config(folder: Path, **parallel: Any) -> Written:
    validation = {"interval_steps": 1, "data": {"path": str(folder / "held_out.json")}}
    return written_run(folder, {**STAGE, "validation": validation}, **parallel)


def trained(resolved: Resolved) -> Stage:
    """The stage once its steps are done, in an initialised process group."""
    place, gate = groups.initialize(resolved.config.parallel, resolved.config.seed), SkipGate()
    stage = build_stage(resolved, resolved.stages[0], place, build_model(resolved, gate), gate)
    for step in range(NUM_STEPS):
        train_step(stage, step)
    return stage


def validated(stage: Stage, packing: str) -> tuple[float, int, int]:
    """By a pass with such rows (packed ones would have trained otherwise); a second one gives the very same."""
    batch = stage.spec.config.batch.model_copy(update={"packing": packing})
    spec = stage.spec.model_copy(update={"config": stage.spec.config.model_copy(update={"batch": batch})})
    validator = Validator(replace(stage, spec=spec), RunLog(Path(), tensorboard=False, enabled=False))
    (found, _), (again, _) = validator.validate(), validator.validate()
    assert found is not None and found == again and [sample.key for sample in found.skipped] == ["bad"]
    assert {"data", "validation"} <= {mark.phase for mark in trail.marks()}
    return found.loss, found.num_tokens, found.num_samples


def validate_layouts() -> None:
    """What two ranks run."""
    folder = Path(os.environ["FOLDER"])
    found = {}
    with process_group(60.0):
        for name, (packing, parallel) in LAYOUTS.items():
            stage = trained(resolved_run(config(folder, **parallel), 2))
            found[name] = validated(stage, packing)
            stage.close()
            groups.destroy()
        if dist.get_rank() == 0:
            (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, tuple[float, int, int]]:
    """On one rank, by packing; ``apart``: computed sample by sample."""
    with process_group(60.0):
        stage = trained(resolved_run(config(folder)))
        found = {packing: validated(stage, packing) for packing in ("pad", "none", "pack")}
        found["apart"] = one_by_one(stage)
        stage.close()
        groups.destroy()
    return found


@torch.no_grad()
def one_by_one(stage: Stage) -> tuple[float, int, int]:
    """Each sample in a row of its own length, its logits' cross entropy in float64 by torch."""
    spec, (model,) = as_validated(stage.spec), stage.chunks
    assert spec.held_out is not None
    source, preparer = (
        open_samples(stage.resolved, spec.held_out),
        BatchPreparer(stage.resolved, spec, needs_pixels=True),
    )
    losses = [torch.zeros(0, dtype=torch.float64)]
    model.eval()
    for number in range(len(source)):
        if (record := source[number]).key == "bad":
            continue
        batch = row_of(preparer, number, record, spec.uncompressed)
        assert len(batch.visual_indices) == 16 * len(batch.num_kept)  # of every image all tokens
        model.module.set_input_tensor([None])
        logits = model(batch.to(current_device().torch_device), None)[0].double()
        of_tokens = torch.nn.functional.cross_entropy(logits, batch.labels[0], reduction="none")
        losses.append(of_tokens[batch.loss_mask[0] > 0])
    model.train()
    found = torch.cat(losses)
    return float(found.mean()), len(found), len(losses) - 1


def row_of(preparer: BatchPreparer, number: int, record: Any, counts: Any) -> Batch:
    sample = preparer.prepare(number, record, counts)
    return collate([[sample]], sequence_length=sample.length, dense_length=None, pad_id=0, packed=False)


@pytest.mark.parametrize("packing", ["pad", "none", "pack"])
def test_it_is_the_mean_over_the_samples_one_by_one(alone: dict[str, tuple[float, int, int]], packing: str) -> None:
    (loss, *counts), (apart, *theirs) = alone[packing], alone["apart"]
    assert counts == theirs and counts[1] == 22
    assert loss == pytest.approx(apart, rel=LOSS_RTOL)


@pytest.mark.timeout(200)
def test_layouts_agree(folder: Path, alone: dict[str, tuple[float, int, int]]) -> None:
    run_ranks(validate_layouts, 2, 180, FOLDER=folder)
    found = json.loads((folder / "found.json").read_text())
    assert found.keys() == LAYOUTS.keys()
    expected, *theirs = alone["apart"]
    for name, (loss, *counts) in found.items():
        assert counts == theirs, name
        assert loss == pytest.approx(expected, rel=LOSS_RTOL), name
