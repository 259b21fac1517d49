"""FLOPs of a step against what PyTorch counts in that very step: the model, the schedule, the batches and masks that train.

PyTorch counts attention only where it is made of products, so ``SDPBackend.MATH`` is asked for; it computes all scores,
``causal="full"``. Rows are packed here by a mask, so that all pairs of a row are computed too: what counts are those within samples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_sts.cost.flops import TokenLoad, rank_flops, step_flops
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.stage import Stage, build_stage
from megatron_sts.train.step import StepResult, train_step
from tests.dist import ladder

BATCH = {**ladder.BATCH, "micro_batch_size": 2, "global_batch_size": 6}
"""Three micro-batches of two of ``write_samples``' rows: some of text alone, some with an image, some with two."""
PACKED = {**BATCH, "packing": "pack", "sequence_length": 160}
CASES: dict[str, dict[str, Any]] = {
    "everything learns": {},
    "frozen tower and projector": {"freeze": ["vision", "projector"]},
    # In one micro-batch: for one without images no backward pass runs at all, where only tower and projector learn.
    "frozen decoder": {"freeze": ["language"], "batch": {**BATCH, "micro_batch_size": 6}},
    "rows of the longest": {"batch": {**BATCH, "packing": "none"}},
    "VTC before the projector": {"freeze": ["vision"], "vtc": {"keep_ratio": 0.5, "sampler": "uniform"}},
    "VTC after it, LDS of micro-batches": {
        "vtc": {"keep_ratio": 0.25, "sampler": "pooled"},
        "lds": {**ladder.BERNOULLI, "granularity": "microbatch"},
    },
    "packed rows, VTC and LDS": {
        "freeze": ["vision"],
        "batch": PACKED,
        "vtc": {"keep_ratio": 0.5, "sampler": "uniform"},
        "lds": ladder.BERNOULLI,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    found = tmp_path_factory.mktemp("samples")
    ladder.write_samples(found)
    with process_group(60.0):
        yield found


def executed(folder: Path, stage: dict[str, Any], samples: str = "samples.json") -> tuple[Stage, StepResult, int]:
    """A stage's first step on this one rank, and the FLOPs that PyTorch counted in it."""
    written = ladder.written_run(folder, {"name": "only", "steps": 1, "batch": BATCH, **stage})
    written["data"]["path"] = str(folder / samples)
    resolved = ladder.resolved_run(written)
    place, gate = groups.initialize(resolved.config.parallel, seed=1), SkipGate()
    try:
        built = build_stage(resolved, resolved.stages[0], place, build_model(resolved, gate), gate)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            result = train_step(built, 0)
        built.close()
    finally:
        groups.destroy()
    return built, result, counter.get_total_flops()


def not_counted(stage: Stage, load: TokenLoad) -> int:
    """What megatron-core computes with products of matrices although it is none of the model's: RoPE's angles, of three axes, from positions
    and half a head's frequencies; a gradient of the projector's input, whether or not the tower learns; means of ``pooled``, over rows, then
    over columns of an image's tokens, and their gradients."""
    model, frozen = stage.resolved.config.model, stage.spec.config.freeze
    language, vision = model.language, model.vision
    assert vision is not None
    angles = 3 * 2 * load.num_tokens * (language.hidden_size // language.num_attention_heads // 2)
    is_useless = "vision" in frozen and "projector" not in frozen
    useless = is_useless * 2 * load.num_projected_tokens * vision.hidden_size * language.hidden_size
    is_pooled = stage.spec.config.vtc is not None and stage.spec.config.vtc.sampler == "pooled"
    side, kept = vision.image_size // vision.patch_size, 2
    means = is_pooled * load.num_images * 2 * 2 * (kept * side * side + kept * side * kept) * language.hidden_size
    return angles + useless + means


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_rows_of_text_of_an_image_and_of_several(folder: Path, num_images: int) -> None:
    entries = json.loads((folder / "samples.json").read_text())
    alike = [entry for entry in entries if len(entry["image"]) == num_images]
    assert len(alike) >= 4
    (folder / "alike.json").write_text(json.dumps(alike))
    four = {**BATCH, "micro_batch_size": 2, "global_batch_size": 4}
    stage, result, counted = executed(folder, {"freeze": ["vision"], "batch": four}, "alike.json")
    load = result.totals.load
    assert load.num_images == 4 * num_images
    found = step_flops(stage.resolved, stage.spec, load, layers_executed=stage.num_layers, causal="full")
    assert found + not_counted(stage, load) == counted


@pytest.mark.parametrize("case", CASES)
def test_a_step_counts_what_it_executes(folder: Path, case: str) -> None:
    stage, result, counted = executed(folder, CASES[case])
    load, batch = result.totals.load, stage.spec.config.batch
    if batch.packing == "pack":  # what torch's layers compute: every pair of a row
        assert load.num_pairs < load.num_tokens * batch.sequence_length
        load = replace(load, num_pairs=load.num_tokens * batch.sequence_length)
    layers_executed = sum(result.layer_runs) / stage.spec.num_microbatches
    found = step_flops(stage.resolved, stage.spec, load, layers_executed=layers_executed, causal="full")
    assert found + not_counted(stage, load) == counted, (load, result.layer_runs)
    assert load.num_images > 0 and (layers_executed < stage.num_layers) == ("LDS" in case)
    assert rank_flops(stage.resolved, stage.spec, load, result.layer_runs, pp_rank=0, causal="full") == found
