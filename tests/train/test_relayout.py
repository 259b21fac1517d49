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
FIRST: dict[str, Any] = {"vision": "first"}
TP2: dict[str, Any] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
# The first is trained in one piece; its checkpoint within fine-tuning is what the others go on from.
LAYOUTS: dict[str, tuple[int, list[dict[str, Any]]]] = {
    "two ranks": (2, [PP2 | FIRST, PP2, VPP2, {**PP2, "layout": [1, 3]}, {**VPP2, "layout": [2, 0, 1, 1]}]),
    # The distributed optimizer's shards lie on data- times context-parallel ranks.
    "context": (2, [CP2 | FIRST, PP2 | {"use_distributed_optimizer": True}]),
    # In alignment the second pipeline rank has nothing to train, and no optimizer state to save.
    "four ranks": (4, [PP2 | COPIES, VPP2 | COPIES, VPP2 | COPIES | {"layout": [2, 0, 1, 1]}]),
    # A tower that all ranks hold whole, which is the default of a frozen one; two of them share it out; one stage's alone.
    "spread": (4, [PP2 | COPIES, TP2 | COPIES | FIRST, TP2 | COPIES, PP2 | COPIES | FIRST]),
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


def gone_on(whole: Path, run: Path, stage: str, step: int) -> Path:
    """A copy of a run that knows nothing after this checkpoint."""
    shutil.copytree(whole, run)
    names = sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
    last = next(name for name in names if name.endswith(f"{stage}-{step:07}"))
    for name in names[names.index(last) + 1 :]:
        shutil.rmtree(run / "checkpoints" / name)
    return run


def check_last_steps(run: Path, expected: Path, resumed: tuple[str, int]) -> None:
    assert [(event["stage"], event["step"]) for event in events(run, "resume")][-1] == resumed
    for key, wanted in steps(expected).items():
        if key >= resumed:
            found = steps(run)[key]
            assert found["layer_runs"] == wanted["layer_runs"] and found["skip_digest"] == wanted["skip_digest"]
            assert found["loss"] == pytest.approx(wanted["loss"], rel=LOSS_RTOL), key
            assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=NORM_RTOL), key


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_checkpoint_goes_on_in_another_layout(tmp_path: Path, name: str) -> None:
    num_ranks, layouts = LAYOUTS[name]
    whole, configs = tmp_path / "whole", [written(layout, qformer=name == "qformer") for layout in layouts]
    assert act(num_ranks, scene(whole, configs[0])) == [[0]] * num_ranks
    moved = [tmp_path / f"moved{number}" for number in range(len(layouts))]
    for run in moved:
        gone_on(whole, run, "finetune", 2)
    scenes = [scene(run, each) for run, each in zip(moved, configs, strict=True)]
    assert act(num_ranks, *scenes) == [[0] * len(layouts)] * num_ranks
    for run in moved:
        check_last_steps(run, whole, ("finetune", 2))
    # The same layout, first of the list: bit for bit.
    assert steps(moved[0]) == steps(whole)
    if name == "context":
        check_one_rank(tmp_path, whole, configs[0])


def check_one_rank(folder: Path, whole: Path, of_two: dict[str, Any]) -> None:
    """One rank goes on from two context-parallel ones, in the middle of alignment; and two again from it, within fine-tuning."""
    alone = gone_on(whole, folder / "alone", "alignment", 2)
    assert act(1, scene(alone, written({"use_distributed_optimizer": True}, qformer=False))) == [[0]]
    check_last_steps(alone, whole, ("alignment", 2))
    back = gone_on(alone, folder / "back", "finetune", 2)
    assert act(2, scene(back, of_two)) == [[0]] * 2
    check_last_steps(back, whole, ("finetune", 2))
