"""What may change between two starts in one RUN_DIR, and which checkpoint is the newest. No run is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from megatron_sts.cli import main
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import load
from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.run_folder import MANIFEST, whole_checkpoints
from megatron_sts.config.schema import RunConfig
from megatron_sts.launch import outcome
from megatron_sts.report.run import METRICS
from megatron_sts.runtime.integrity import digest_of
from megatron_sts.runtime.kernels import Kernels
from megatron_sts.train.resume import (
    EVALUATION,
    Progress,
    check_same_run,
    damage_of_progress,
    evaluation_of,
    is_finished,
    read_progress,
    write_config,
)
from tests.train import stagehand

KERNELS = Kernels(*("torch",) * 4, "off", "megatron-core", ())  # type: ignore[arg-type]


def resolved(**changes: Any) -> Resolved:
    return resolve(RunConfig.model_validate(stagehand.config(**changes)))


def checkpoint(run_dir: Path, name: str, **progress: int) -> None:
    folder = run_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text(json.dumps(progress))


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run that has saved its first checkpoint."""
    write_config(resolved(), tmp_path, KERNELS, {})
    checkpoint(tmp_path, "0-alignment-0000002", stage=0, step=2)
    return tmp_path


VALIDATION = {"interval_steps": 2, "num_samples": 8}


def write_steps(run_dir: Path, *events: dict[str, Any], steps: int = 4) -> None:
    """Lines of a run whose last stage came so far, and what followed."""
    lines = [{"stage": stage, "step": step} for stage, num in (("alignment", 4), ("finetune", steps)) for step in range(num)]  # fmt: skip
    (run_dir / METRICS).write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, *events]))


SAVED = {"event": "checkpoint", "stage": "finetune", "step": 4}


def test_a_whole_run_is_over_without_its_checkpoints(tmp_path: Path) -> None:
    """Nothing is left to do, and another run is refused: it would be written over."""
    write_config(resolved(), tmp_path, KERNELS, {})
    write_steps(tmp_path, SAVED)
    check_same_run(resolved(), tmp_path)
    assert is_finished(resolved(), tmp_path)
    with pytest.raises(ConfigError, match=r"^seed=2: .* holds a run with seed=1; .* or give another --run-dir$"):
        check_same_run(resolved(seed=2), tmp_path)
    longer = [{**stage, "steps": 9} if stage["name"] == "finetune" else stage for stage in stagehand.config()["stages"]]
    with pytest.raises(ConfigError, match=r"^stages\.finetune\.steps=9: "):
        check_same_run(resolved(stages=longer), tmp_path)
    asked = resolved(evaluation={"num_questions": 10})
    with pytest.raises(
        ConfigError, match=r"^evaluation\.num_questions=10: .*, and no checkpoint of it any more to ask these; "
    ):
        check_same_run(asked, tmp_path)
    (tmp_path / EVALUATION).write_text(json.dumps({**evaluation_of(asked), "splits": {}}))
    check_same_run(asked, tmp_path)
    assert is_finished(asked, tmp_path)
    checkpoint(tmp_path, "0-alignment-0000004", stage=1, step=0)
    assert not is_finished(asked, tmp_path)


def test_a_run_that_is_done_is_over_though_no_line_tells_of_its_last_save(tmp_path: Path) -> None:
    """As after a kill between a save and its line. Of a folder in which nothing but the outcome is left nothing can be lost."""
    outcome.write(tmp_path, "done")
    assert not is_finished(resolved(), tmp_path)
    write_config(resolved(), tmp_path, KERNELS, {})
    write_steps(tmp_path)
    assert is_finished(resolved(), tmp_path)
    write_steps(tmp_path, steps=3)
    with pytest.raises(
        ConfigError, match=r"metrics.jsonl: is damaged \(ends before the run did\); restore it, delete "
    ):
        is_finished(resolved(), tmp_path)


@pytest.mark.parametrize(
    ("events", "steps"),
    [
        ([], 4),
        ([{**SAVED, "stage": "alignment"}], 4),
        ([{**SAVED, "step": 2}], 3),
        ([SAVED, {"stage": "finetune", "step": 3}], 4),
    ],
    ids=["never saved", "cut off in the last save", "cut off", "begun anew"],
)
def test_a_run_that_was_cut_off_begins_anew(tmp_path: Path, events: list[dict[str, Any]], steps: int) -> None:
    write_config(resolved(), tmp_path, KERNELS, {})
    (tmp_path / EVALUATION).write_text('{"splits": {}}')
    write_steps(tmp_path, *events, steps=steps)
    check_same_run(resolved(seed=2), tmp_path)
    assert not is_finished(resolved(), tmp_path)


def test_how_often_is_free_and_on_what_is_not(run_dir: Path) -> None:
    """Validation may begin, and come more often; checkpoints are compared by it, so that it goes on with the same samples."""
    validated = resolved(stages=stages(validation=VALIDATION))
    check_same_run(validated, run_dir)
    write_config(validated, run_dir, KERNELS, {})
    check_same_run(resolved(stages=stages(validation={**VALIDATION, "interval_steps": 1})), run_dir)
    for other, field in (({**VALIDATION, "num_samples": 9}, r"validation\.num_samples=9"), (None, "validation=null")):
        with pytest.raises(ConfigError, match=rf"^stages\.finetune\.{field}: .* restore that value to go on"):
            check_same_run(resolved(stages=stages(validation=other)), run_dir)


def stages(**finetune: Any) -> list[Any]:
    first, second = stagehand.config()["stages"]
    return [first, second | finetune]


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel": {"pipeline_model_parallel_size": 2}},
        {"logging": {"interval_steps": 3}},
        {"checkpoint": {"keep_last": 1}},
        {"evaluation": {"num_questions": 10}},
        {"stages": stages(data={"mode": "questions", "num_turns": 1, "max_bad_fraction": 0.5, "num_workers": 7})},
    ],
)
def test_may_change(run_dir: Path, changes: dict[str, Any]) -> None:
    check_same_run(resolved(**changes), run_dir)


@pytest.mark.parametrize(
    ("changes", "field", "new", "old"),
    [
        ({"seed": 2}, "seed", "2", "1"),
        ({"precision": {"params": "bf16"}}, "precision.params", '"bf16"', '"fp32"'),
        ({"stages": stages(data={"mode": "questions", "num_turns": 2})}, "stages.finetune.data.num_turns", "2", "1"),
        ({"stages": stages(lds={"alpha": 0.5})}, "stages.finetune.lds.alpha", "0.5", "0.6"),
        ({"stages": stages(name="other")}, "stages", '["alignment", "other"]', '["alignment", "finetune"]'),
        ({"stages": stages()[::-1]}, "stages", '["finetune", "alignment"]', '["alignment", "finetune"]'),
        ({"parallel": {"use_distributed_optimizer": True}}, "parallel.use_distributed_optimizer", "true", "false"),
    ],
)
def test_must_stay(run_dir: Path, changes: dict[str, Any], field: str, new: str, old: str) -> None:
    with pytest.raises(ConfigError) as refused:
        check_same_run(resolved(**changes), run_dir)
    assert str(refused.value).startswith(f"{field}={new}: {run_dir} holds a run with {field}={old}; ")


def test_packed_rows_must_stay_on_as_many_ranks(tmp_path: Path) -> None:
    packed = stages()
    packed[0] = packed[0] | {"batch": {**packed[0]["batch"], "packing": "pack"}}
    two = {"parallel": {"data_parallel_size": 2}}
    write_config(resolved(stages=packed), tmp_path, KERNELS, {})
    checkpoint(tmp_path, "0-alignment-0000002", stage=0, step=2)
    check_same_run(resolved(stages=packed), tmp_path)
    refused = r"parallel\.data_parallel_size=2: stage alignment was saved on 1, .* or delete .*0-alignment-0000002"
    with pytest.raises(ConfigError, match=refused):
        check_same_run(resolved(stages=packed, **two), tmp_path)
    checkpoint(tmp_path, "0-alignment-0000004", stage=0, step=4)  # its end: the next stage reads anew
    check_same_run(resolved(stages=packed, **two), tmp_path)


def test_without_checkpoint_anything_may_change(tmp_path: Path) -> None:
    check_same_run(resolved(seed=2), tmp_path)
    write_config(resolved(), tmp_path, KERNELS, {})
    check_same_run(resolved(seed=2), tmp_path)


def test_whole_checkpoints_in_order(run_dir: Path) -> None:
    for name in ("1-finetune-0000001", "0-alignment-0000010", ".partial-1-finetune-0000002"):
        checkpoint(run_dir, name)
    (run_dir / "checkpoints" / "1-finetune-0000003").mkdir()
    names = [path.name for path in whole_checkpoints(run_dir / "checkpoints")]
    assert names == ["0-alignment-0000002", "0-alignment-0000010", "1-finetune-0000001"]


def test_finished(run_dir: Path) -> None:
    assert not is_finished(resolved(), run_dir)
    checkpoint(run_dir, "1-finetune-0000002", stage=1, step=2)
    assert not is_finished(resolved(), run_dir)
    checkpoint(run_dir, "1-finetune-0000004", stage=1, step=4)
    assert is_finished(resolved(), run_dir)
    assert not is_finished(resolved(evaluation={"num_questions": 10}), run_dir)


@pytest.mark.parametrize("written", ['{"splits": {"eval', "[1]", "\xff"], ids=["cut off", "no keys", "a bad byte"])
def test_a_damaged_evaluation_is_named_and_can_be_asked_again(run_dir: Path, written: str) -> None:
    """Of a trained run: neither finished nor trained over; without the file its questions are asked again."""
    checkpoint(run_dir, "1-finetune-0000004", stage=1, step=4)
    asked, path = resolved(evaluation={"num_questions": 10}), run_dir / EVALUATION
    path.write_text(written, encoding="latin-1")
    with pytest.raises(
        ConfigError, match=r"evaluation.json: is damaged \(.*\); delete it to have the questions asked again$"
    ):
        is_finished(asked, run_dir)
    path.unlink()
    assert not is_finished(asked, run_dir)


def test_damaged_progress(run_dir: Path) -> None:
    (newest,) = whole_checkpoints(run_dir / "checkpoints")
    assert read_progress(newest) == Progress(stage=0, step=2)
    (newest / "progress.json").write_text("{")
    with pytest.raises(ConfigError, match=r"progress.json is damaged .*; delete .*0-alignment-0000002 to go on"):
        read_progress(newest)


def test_a_later_versions_checkpoint_is_not_lost(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused before ranks start; a field whose name a flipped bit changed is damage, as its digest shows."""
    monkeypatch.setattr("megatron_sts.launch.local.launch_local", lambda *_: pytest.fail("ranks were started"))
    name = "0-alignment-0000004"
    checkpoint(run_dir, name, stage=0, step=4, num_thaws=1)
    newest = run_dir / "checkpoints" / name
    (newest / MANIFEST).write_text(
        json.dumps({"algorithm": "sha256", "files": {"progress.json": digest_of(newest / "progress.json")}})
    )
    (run_dir / "config.yaml").write_text(yaml.safe_dump(stagehand.config()))
    assert main(["train", str(run_dir), "--run-dir", str(run_dir)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        f"checkpoint {name}: a later version of megatron-sts wrote it: this one does not know num_thaws in its" in line
    )
    assert damage_of_progress(newest) is None and newest.is_dir()

    (newest / "progress.json").write_text(json.dumps({"stage": 0, "stdp": 4}))
    assert "is damaged" in (damage_of_progress(newest) or "")
    check_same_run(resolved(), run_dir)
    with pytest.raises(ConfigError, match=rf"^checkpoint {name}: progress\.json is damaged"):
        read_progress(newest)


def test_the_resolved_config_shows_the_kernels_and_is_read_back(run_dir: Path) -> None:
    written = OmegaConf.load(run_dir / "config.resolved.yaml")
    assert written.resolved.kernels.linear == "torch"
    assert resolve(load(run_dir / "config.resolved.yaml")) == resolved()


def test_a_stage_grows_when_that_is_asked_for(run_dir: Path) -> None:
    longer = resolved(stages=stages(steps=9))
    refused = (
        rf"^stages\.finetune\.steps=9: {run_dir} holds a run in which that stage has 4 steps, not 9; add --extend to"
    )
    with pytest.raises(ConfigError, match=refused):
        check_same_run(longer, run_dir)
    check_same_run(longer, run_dir, extend=True)
    checkpoint(run_dir, "1-finetune-0000004", stage=1, step=4)
    check_same_run(longer, run_dir, extend=True)
    assert is_finished(resolved(), run_dir) and not is_finished(longer, run_dir)


def test_a_stage_does_not_shrink_nor_grow_once_it_is_over(run_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"^stages\.finetune\.steps=3: .* has 4 steps, not 3; restore that number"):
        check_same_run(resolved(stages=stages(steps=3)), run_dir, extend=True)
    first, second = stages()
    checkpoint(run_dir, "0-alignment-0000004", stage=0, step=4)
    check_same_run(resolved(stages=[first | {"steps": 5}, second]), run_dir, extend=True)
    checkpoint(run_dir, "1-finetune-0000002", stage=1, step=2)
    with pytest.raises(ConfigError, match=r"^stages\.alignment\.steps=5: .* 4 steps, not 5, and is over; restore"):
        check_same_run(resolved(stages=[first | {"steps": 5}, second]), run_dir, extend=True)


def test_the_option_lets_ranks_start(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[object] = []
    monkeypatch.setattr("megatron_sts.launch.local.launch_local", lambda work, *_: started.append(work) or 0)
    (run_dir / "config.yaml").write_text(yaml.safe_dump(stagehand.config()))
    words = ["train", str(run_dir), "stages.finetune.steps=9", "--run-dir", str(run_dir)]
    assert main(words) == 2
    assert "stages.finetune.steps=9: " in capsys.readouterr().err and not started
    assert main([*words, "--extend"]) == 0
    assert len(started) == 1


def test_epochs_count_by_their_steps(tmp_path: Path) -> None:
    def of(**length: Any) -> Resolved:
        stage = stages()[1] | {"data": {"mode": "questions", "num_samples": 32}, "steps": None, **length}
        return resolved(stages=[stage])

    write_config(of(epochs=1), tmp_path, KERNELS, {})
    checkpoint(tmp_path, "0-finetune-0000002", stage=0, step=2)
    check_same_run(of(steps=4), tmp_path)
    with pytest.raises(ConfigError, match=r"^stages\.finetune\.epochs=2\.0: .* has 4 steps, not 8; add --extend"):
        check_same_run(of(epochs=2), tmp_path)
    check_same_run(of(epochs=2), tmp_path, extend=True)
