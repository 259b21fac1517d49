"""Parameters and gradient buckets against those of the model that is really built."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sts.cost.buckets import buckets, chunk_weights
from megatron_sts.cost.memory import learning_parts
from megatron_sts.lds.gate import SkipGate
from megatron_sts.mcore import groups
from megatron_sts.model.init import build_model
from megatron_sts.runtime.dist import process_group
from megatron_sts.train.stage import build_stage
from tests.dist.ladder import resolved_run, write_samples, written_run

CASES = {
    "plain": ("plain", [], {}, "fp32"),
    "tower frozen, bf16": ("plain", ["vision"], {"use_distributed_optimizer": True}, "bf16"),
    "tied": ("tied", ["vision"], {"use_distributed_optimizer": True}, "fp32"),
    "siglip, QKV biases": ("siglip", [], {"use_distributed_optimizer": True}, "bf16"),
    "projector alone": ("plain", ["vision", "language"], {}, "bf16"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rank_holds_and_lays_out_what_is_counted(name: str, tmp_path: Path) -> None:
    model, freeze, parallel, params = CASES[name]
    stage = {"name": "only", "steps": 1, "freeze": freeze}
    write_samples(tmp_path)
    resolved = resolved_run(written_run(tmp_path, stage, model=model, params=params, **parallel))
    with process_group(60.0):
        place, gate = groups.initialize(resolved.config.parallel, seed=1), SkipGate()
        chunks = build_model(resolved, gate)
        held = [parameter.numel() for chunk in chunks for parameter in chunk.parameters()]
        built = build_stage(resolved, resolved.stages[0], place, chunks, gate)
        laid_out = [
            (group.layer, bucket.grad_data.numel())
            for chunk in built.chunks
            for group in chunk.bucket_groups
            for bucket in group.buckets
        ]
        built.close()
        groups.destroy()
    assert [each.num_elements for each in chunk_weights(resolved, 0, 0)] == held
    expected = buckets(resolved, 0, learning_parts(resolved, resolved.stages[0]))
    assert [(bucket.layer, bucket.num_elements) for bucket in expected] == laid_out
