"""Which checkpoint a path means, and with which models its weights may begin."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sts.config.architecture import ModelConfig
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.files import missing_weights
from megatron_sts.config.run_folder import (
    best_checkpoints,
    checkpoint_of,
    config_of,
    is_of_run,
    partial_checkpoints,
    set_aside,
    whole_checkpoints,
)
from megatron_sts.config.schema import RunConfig
from megatron_sts.config.weights_folder import other_models

SIZES = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4}
MODEL: dict[str, Any] = {
    "vision": {**SIZES, "image_size": 32, "patch_size": 8},
    "qformer": None,
    "projector": {"type": "mlp2x_gelu"},
    "language": {**SIZES, "ffn_hidden_size": 64, "vocab_size": 100},
}
STAGES = [{"name": "alignment", "index": 0, "num_steps": 4}, {"name": "finetune", "index": 1, "num_steps": 8}]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run in the middle of its second stage."""
    run = tmp_path / "run"
    for name in ("0-alignment-0000004", "1-finetune-0000002"):
        (run / "checkpoints" / name).mkdir(parents=True)
        (run / "checkpoints" / name / "progress.json").write_text("{}")
    written = {"model": MODEL, "resolved": {"stages": STAGES}}
    (run / "config.resolved.yaml").write_text(yaml.safe_dump(written))
    return run


def test_a_path_means_a_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = run / "checkpoints"
    assert checkpoint_of(run) == checkpoints / "1-finetune-0000002"
    assert checkpoint_of(checkpoints / "1-finetune-0000002") == checkpoints / "1-finetune-0000002"
    assert checkpoint_of(checkpoints / "alignment") == checkpoints / "0-alignment-0000004"
    for path in (run, checkpoints / "alignment", checkpoints / "1-finetune-0000002"):
        assert is_of_run(path) and config_of(path).samefile(run / "config.resolved.yaml")
    assert not is_of_run(run.parent) and not is_of_run(checkpoints)
    monkeypatch.chdir(checkpoints)
    assert checkpoint_of(Path("alignment")) == Path("0-alignment-0000004")


def test_the_best_of_a_stage(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That with the lowest validation loss: not of another stage, and none whose progress cannot be read."""
    checkpoints = run / "checkpoints"
    losses = {"0-alignment-0000004": "0.1", "1-finetune-0000002": "2.5", "1-finetune-0000003": "1.5"}
    losses |= {"1-finetune-0000004": "null", "1-finetune-0000005": "1.5", "1-finetune-0000006": "1.4999, }"}
    for name, loss in losses.items():
        (checkpoints / name).mkdir(exist_ok=True)
        (checkpoints / name / "progress.json").write_text(f'{{"validation_loss": {loss}}}')
    best = checkpoints / "finetune" / "best"
    assert is_of_run(best) and checkpoint_of(best) == checkpoints / "1-finetune-0000003"
    assert config_of(best).samefile(run / "config.resolved.yaml")
    found = best_checkpoints(whole_checkpoints(checkpoints), 2)
    assert [path.name for path in found] == ["0-alignment-0000004", "1-finetune-0000003", "1-finetune-0000005"]
    assert list(missing_weights(RunConfig.model_construct(model=begun_with(best)))) == []
    monkeypatch.chdir(checkpoints)
    assert checkpoint_of(Path("finetune/best")) == Path("1-finetune-0000003")
    for name, said in (
        ("finetune", "none of the stage's 1 checkpoints has a validation loss"),
        ("tune", "no such stage"),
    ):
        for path in whole_checkpoints(checkpoints)[1 if name == "finetune" else 99 : -1]:
            (path / "progress.json").unlink()
        with pytest.raises(ConfigError, match=f"^{checkpoints}/{name}.*{said}"):
            checkpoint_of(checkpoints / name / "best")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("finetune", r"the end of that stage, 1-finetune-0000008, is not among .*\(0-alignment-0000004, 1-finetune-0000002\)"),
        ("fintune", "that run has no such stage; choose from alignment, finetune"),
    ],
)  # fmt: skip
def test_a_stage_without_its_end_is_refused(run: Path, name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{run}/checkpoints/{name}: {said}"):
        checkpoint_of(run / "checkpoints" / name)


def test_what_was_set_aside_is_no_checkpoint(run: Path) -> None:
    checkpoints, names = run / "checkpoints", ["0-alignment-0000004", "1-finetune-0000002"]
    assert [path.name for path in whole_checkpoints(checkpoints)] == names
    for name in ("broken-1-finetune-0000002", "broken-1-finetune-0000002.2"):
        assert set_aside(checkpoints / names[1]).name == name
        (checkpoints / names[1]).mkdir()
    assert [path.name for path in partial_checkpoints(checkpoints)] == names[1:]
    assert [path.name for path in whole_checkpoints(checkpoints)] == names[:1]


def begun_with(init: Path, **changes: dict[str, Any]) -> ModelConfig:
    parts = {part: section for part, section in MODEL.items() if section is not None}
    return ModelConfig.model_validate(
        {part: {**section, "init": str(init), **changes.pop(part, {})} for part, section in parts.items()} | changes
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, None),
        ({"language": {"vocab_size": 128, "init_std": 0.5}, "vision": {"feature_layer": -3}}, None),
        ({"language": {"rotary_base": 500000}}, "model.language.rotary_base=500000: the weights in .* with 10000; correct"),
        ({"language": {"num_layers": 2}}, "model.language.num_layers=2: the weights in .* were made with 4; correct it"),
        ({"language": {"vocab_size": 99}}, "model.language.vocab_size=99: .* have 100 rows; use at least 100"),
        ({"projector": {"type": "linear"}}, "model.projector.type=linear: .* were made with mlp2x_gelu; correct it"),
        ({"vision": {"pixel_mean": [0.5] * 3}}, r"model.vision.pixel_mean=\(0.5, 0.5, 0.5\): .* were made with None"),
        ({"vision": {"feature_layer": -1}}, "model.vision.feature_layer=-1: .* built no layers after -2; use -2, or"),
        ({"qformer": {"init": "RUN"}}, "model.qformer.init=.*: the model of that run has no qformer; set it to null"),
    ],
)  # fmt: skip
def test_weights_of_another_model_are_refused(run: Path, changes: dict[str, Any], said: str | None) -> None:
    if "qformer" in changes:
        changes = {"qformer": {"init": str(run)}}
    lines = list(other_models(begun_with(run / "checkpoints" / "alignment", **changes)))
    if said is None:
        assert lines == []
    else:
        (line,) = lines
        assert re.match(said, line), line


def test_a_run_without_a_checkpoint_is_an_obstacle(run: Path) -> None:
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "progress.json").unlink()
    assert [line.partition(": ")[2] for line in other_models(begun_with(run))] == [
        "the run has no checkpoint yet; let it train on"
    ] * 3


def test_the_name_of_a_stage_is_no_missing_file(run: Path) -> None:
    config = {"model": begun_with(run / "checkpoints" / "alignment").model_dump(), "stages": [stage()]}
    assert list(missing_weights(RunConfig.model_validate(config))) == []
    config["model"] = begun_with(run / "alignment").model_dump()
    assert len(list(missing_weights(RunConfig.model_validate(config)))) == 3


def stage() -> dict[str, Any]:
    batch = {"global_batch_size": 1, "micro_batch_size": 1, "sequence_length": 64}
    return {"name": "one", "steps": 1, "optimizer": {"lr": 1}, "batch": batch}
