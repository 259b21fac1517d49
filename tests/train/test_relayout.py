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
# The first is trained in one piece; its checkpoint within fine-tuning is what the others go on from.
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [PP2, VPP2, {**PP2, "layout": [1, 3]}, {**VPP2, "layout": [2, 0, 1, 1]}],
    # In alignment the second pipeline rank has nothing to train, and no optimizer state to save.
    4: [PP2 | COPIES, VPP2 | COPIES, VPP2 | COPIES | {"layout": [2, 0, 1, 1]}],
}


def written(layout: dict[str, Any]) -> dict[str, Any]:
    return config(parallel={"timeout_s": 100, **layout})


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_a_checkpoint_goes_on_in_another_layout(tmp_path: Path, num_ranks: int) -> None:
    whole, layouts = tmp_path / "whole", LAYOUTS[num_ranks]
    assert act(num_ranks, scene(whole, written(layouts[0]))) == [[0]] * num_ranks
    moved = [tmp_path / f"moved{number}" for number in range(len(layouts))]
    for run in moved:
        shutil.copytree(whole, run)
        shutil.rmtree(run / "checkpoints" / "1-finetune-0000004")
    scenes = [scene(run, written(layout)) for run, layout in zip(moved, layouts, strict=True)]
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
