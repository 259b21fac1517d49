"""A checkpoint that megatron-core trained on four ranks, tensor and pipeline parallel: converted, and back into the same layout."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sts.config.schema import ParallelConfig
from megatron_sts.convert import mcore_to_sts, sts_to_mcore, verify
from megatron_sts.mcore import groups
from megatron_sts.runtime.dist import process_group
from tests.convert import mcore_models
from tests.convert.test_mcore_checkpoints import RTOL, are_equal, batch_for, stored, write_config
from tests.dist.launch import run_ranks


def save_and_load() -> None:
    """What four ranks run: a training checkpoint in Megatron-LM's folder, converted and back, loaded in the same layout."""
    folder = Path(os.environ["FOLDER"])
    with process_group(120.0):
        groups.initialize(ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2), 1)
        model, optimizer = mcore_models.in_bf16(mcore_models.llava())
        mcore_models.save(model, folder / "mcore" / "iter_0000007", optimizer)
        if dist.get_rank() == 0:
            (folder / "mcore" / "latest_checkpointed_iteration.txt").write_text("7")
            origin = mcore_to_sts.open_origin(folder / "mcore", write_config(folder / "config.yaml", "llava"))
            mcore_to_sts.convert(origin, folder / "sts")
            sts_to_mcore.convert(sts_to_mcore.plan(folder / "sts", like=folder / "mcore"), folder / "back")
        dist.barrier()
        fresh = mcore_models.llava().bfloat16()
        with torch.no_grad():
            for weight in fresh.parameters():
                weight.zero_()
        mcore_models.load(fresh, folder / "back" / "release")
        before, after = (dict(one.named_parameters()) for one in (model, fresh))
        assert are_equal(before, after)
        print("EQUAL", len(before))
        groups.destroy()


def test_training_checkpoints_of_four_ranks(tmp_path: Path) -> None:
    """In bf16, with an optimizer. The reference: megatron-core loads it on one rank."""
    outputs = run_ranks(save_and_load, 4, 240, FOLDER=tmp_path)
    assert sum("EQUAL" in output for output in outputs) == 4
    assert {tensor.dtype for tensor in stored(tmp_path / "sts").values()} == {torch.bfloat16}
    with process_group(60.0):
        groups.initialize(ParallelConfig(), 1)
        model = mcore_models.load(mcore_models.llava(), tmp_path / "mcore" / "iter_0000007")
        resolved, batch, pixels = batch_for(tmp_path / "sts")
        ours = verify.logits_of(resolved, batch)
        assert ours is not None
        difference = verify.largest_difference(ours, mcore_models.logits(model, batch, pixels), batch)
        groups.destroy()
    print(f"{difference:.1e}")
    assert difference <= RTOL
