"""A run that skips layers goes on from a checkpoint in another pipeline layout as if nothing had happened."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.train.stagehand import act, config, events, scene, steps

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# The bounds of tests/dist/test_parity.py, which says where they come from.
LOSS_RTOL, NORM_RTOL = 5 * 1.3e-7, 5 * 1.8e-6
PP2: dict[str, Any] = {"pipeline_model_parallel_size": 2}
VPP2: dict[str, Any] = {**PP2, "virtual_pipeline_model_parallel_size": 2}
COPIES: dict[str, Any] = {"data_parallel_size": 2, "use_distributed_optimizer": True}
CP2: dict[str, Any] = {"context_parallel_size": 2, "use_distributed_optimizer": True}
TP2: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
# The first is trained in one piece; its checkpoint within fine-tuning is what the others go on from.
LAYOUTS: dict[str, tuple[int, list[dict[str, Any]]]] = {
    "two ranks": (2, [PP2, VPP2, {**PP2, "layout": [1, 3]}, {**VPP2, "layout": [2, 0, 1, 1]}]),
    # The distributed optimizer's shards lie on data- times context-parallel ranks.
    "context": (2, [CP2, PP2 | {"use_distributed_optimizer": True}]),
    # In alignment the second pipeline rank has nothing to train, and no optimizer state to save.
    "four ranks": (4, [PP2 | COPIES, VPP2 | COPIES, VPP2 | COPIES | {"layout": [2, 0, 1, 1]}]),
    # Tower and Q-Former are whole on tensor-parallel ranks, the rest is split.
    "qformer": (4, [TP2 | COPIES, PP2 | COPIES]),
}


def written(layout: dict[str, Any], *, qformer: bool) -> dict[str, Any]:
    whole = config(parallel={"timeout_s": 100, **layout})
    if qformer:
        hf_config = {"model_type": "siglip_vision_model", "intermediate_size": 64}
        pixels = {"pixel_mean": [0.5] * 3, "pixel_std": [0.5] * 3}
        whole["model"]["vision"] |= {"tower": "hf", "hf_config": hf_config, **pixels}
        sizes = {"num_query_tokens": 16, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
        whole["model"] |= {"qformer": sizes, "projector": {"type": "linear"}}
        for stage in whole["stages"]:
            stage["freeze"] = [part for part in stage["freeze"] if part != "vision"]
    return whole


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_goes_on_in_another_layout(tmp_path: Path, name: str) -> None:
    num_ranks, layouts = LAYOUTS[name]
    whole, configs = tmp_path / "whole", [written(layout, qformer=name == "qformer") for layout in layouts]
    assert act(num_ranks, scene(whole, configs[0])) == [[0]] * num_ranks
    moved = [tmp_path / f"moved{number}" for number in range(len(layouts))]
    for run in moved:
        shutil.copytree(whole, run)
        shutil.rmtree(run / "checkpoints" / "1-finetune-0000004")
    scenes = [scene(run, each) for run, each in zip(moved, configs, strict=True)]
    assert act(num_ranks, *scenes) == [[0] * len(layouts)] * num_ranks
    expected = steps(whole)
    for run in moved:
        assert [(event["stage"], event["step"]) for event in events(run, "resume")] == [("finetune", 2)]
        for step in (2, 3):
            found, wanted = steps(run)["finetune", step], expected["finetune", step]
            assert found["layer_runs"] == wanted["layer_runs"] and found["skip_digest"] == wanted["skip_digest"]
            assert found["loss"] == pytest.approx(wanted["loss"], rel=LOSS_RTOL)
            assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=NORM_RTOL)
    # The same layout, first of the list: bit for bit.
    assert steps(moved[0]) == expected
