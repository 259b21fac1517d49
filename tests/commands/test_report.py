"""``megatron-sts report`` of a run that was really trained: planned beside real, and what samplers keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from megatron_sts.cli import main
from megatron_sts.commands.expected import expected_of, stages_of
from megatron_sts.config.architecture import TilesConfig
from megatron_sts.config.load import load
from megatron_sts.config.resolve import resolve
from megatron_sts.config.schema import VtcConfig
from megatron_sts.evaluate.kept import kept_of_images, not_on_a_grid
from megatron_sts.evaluate.load import load_for_inference, resolve_source
from megatron_sts.evaluate.scenes import asking_stage, draw_questions, record_of
from megatron_sts.lds.effective import executed_fraction
from megatron_sts.lds.mask import SkipMask
from megatron_sts.lds.placement import placement
from megatron_sts.mcore import groups
from megatron_sts.mcore.module import unwrap
from megatron_sts.mcore.weights import named_weights
from megatron_sts.model.compression import Compression
from megatron_sts.model.prepare import BatchPreparer
from megatron_sts.report.run import read_run
from megatron_sts.runtime.dist import process_group
from tests import warm
from tests.examples.adopting import load_script
from tests.train import stagehand


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of both stages; fine-tuning skips the last two of four layers."""
    folder = tmp_path_factory.mktemp("run")
    written = stagehand.config(checkpoint={})
    written["stages"][1]["lds"] = {"sampler": "fixed", "fixed_layers": [2, 3]}
    (folder / "config.yaml").write_text(yaml.safe_dump(written))
    warm.run(["megatron-sts", "train", str(folder), "--run-dir", str(folder / "run")], check=True, timeout=240)
    return folder / "run"


def test_planned_is_what_was_executed(run_dir: Path) -> None:
    """Nothing is drawn and all rows are full, so that not only means agree."""
    run = read_run(run_dir)
    expected = expected_of(run)
    assert list(expected) == ["alignment", "finetune"]
    for stage, plan in expected.items():
        assert plan.flops == pytest.approx(run.total("flops_executed", stage), rel=1e-9)
        shown, seen = (run.total(f"visual_tokens_{end}", stage) for end in ("out", "in"))
        assert plan.visual_share == pytest.approx(shown / seen)
    assert expected["finetune"].layers.mean(0).tolist() == [1, 1, 0, 0]


def test_planned_layers_are_those_of_the_schedule(tmp_path: Path) -> None:
    written = stagehand.config(checkpoint={})
    written["stages"][1] |= {"steps": 300, "lds": {"alpha": 0.5, "epsilon": 0.3}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    resolved = resolve(load(tmp_path / "config.yaml", []))
    found = stages_of(resolved, {"finetune": 300})["finetune"]
    stage = resolved.stage("finetune")
    assert stage.config.lds is not None
    wanted = executed_fraction(stage.config.lds, 300, placement(resolved, stage))
    assert found.layers.mean(0) == pytest.approx(wanted, abs=1e-3)  # bins of 7 and 8 steps have equal weight
    assert (found.layers[0] < found.layers[-1]).all()


def test_planned_tokens_are_those_of_all_images(tmp_path: Path) -> None:
    """The second of two keeps fewer; without images there are none to tell of."""
    written = stagehand.config(checkpoint={})
    stage = written["stages"][0]
    stage["vtc"] = {"sampler": "uniform", "keep_ratio": 1.0, "keep_ratio_by_image": [1.0, 0.25]}
    stage["batch"] |= {"max_images": 2, "sequence_length": 160}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    for overrides, wanted in (([], 0.625), (["stages.0.data.mode=words"], None)):
        resolved = resolve(load(tmp_path / "config.yaml", overrides))
        assert stages_of(resolved, {"alignment": 2})["alignment"].visual_share == wanted


def test_drawn_is_what_training_would_keep(run_dir: Path, tmp_path: Path) -> None:
    """The samplers that look, against the model's own compression of the same micro-batch."""
    resolved = resolve_source(run_dir, ["evaluation.num_questions=4"])
    records = [record_of(question, False) for question in draw_questions(resolved.config.evaluation, "eval", "choice")]
    with process_group(60):
        _, _, chunks, gate = load_for_inference(run_dir, resolved)
        found = kept_of_images(resolved, chunks, gate, records, 0.25)
        for name in ("guided", "anchored"):
            vtc = VtcConfig(sampler=name, keep_ratio=0.25)
            config = resolved.stages[0].config.model_copy(update={"vtc": vtc})
            stage = resolved.stages[0].model_copy(update={"config": config})
            preparer = BatchPreparer(resolved, stage, needs_pixels=True)
            counts = stage.tokens(0)
            batch = preparer.collate([[preparer.prepare(0, record, counts)] for record in records], counts)
            model = unwrap(chunks[0])
            with torch.no_grad():
                words = model.language.embedding(input_ids=batch.tokens, position_ids=batch.position_ids)
                model.compression = Compression(vtc, stage.visual_tokens_in, None)
                _, chosen = model.see(batch, words)
            kept = chosen.view(len(records), -1) - 64 * torch.arange(len(records)).unsqueeze(1)
            assert kept.tolist() == [list(each.tokens[name]) for each in found]
        groups.destroy()
    assert {name: len(tokens) for name, tokens in found[0].tokens.items()} == dict.fromkeys(
        ("uniform", "random", "pooled", "guided", "anchored"), 16
    )


def test_the_page_shows_what_samplers_keep(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run_dir), "--out", str(tmp_path), "--kept", "2"]) == 0
    assert (tmp_path / "kept_visual_tokens.png").read_bytes().startswith(b"\x89PNG")
    assert "<h2>Kept visual tokens</h2>\n<svg" in (tmp_path / "overview.html").read_text()
    assert json.loads((run_dir / "outcome.json").read_text())["outcome"] == "done"
    capsys.readouterr()


def test_what_has_no_visual_tokens_is_not_drawn(
    tmp_path: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blind = tmp_path / "blind"
    blind.mkdir()
    for name in ("config.resolved.yaml", "metrics.jsonl"):
        (blind / name).write_text((run_dir / name).read_text())
    assert main(["report", str(blind), "--kept", "1"]) == 2
    assert "the run has no checkpoint yet" in capsys.readouterr().err
    assert not (blind / "report.html").exists()
    resolved = resolve_source(run_dir)
    model, vision = resolved.config.model, resolved.config.model.vision
    assert vision is not None and not_on_a_grid(resolved) is None
    for other in (None, vision.model_copy(update={"tiles": TilesConfig(resolutions=((128, 64),))})):
        config = resolved.config.model_copy(update={"model": model.model_copy(update={"vision": other})})
        assert not_on_a_grid(resolved.model_copy(update={"config": config})) is not None


def test_a_layer_that_is_left_out_is_skipped(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``tools/layer_worth.py`` empties matrices; against LDS's gate."""
    tool = load_script(Path(__file__).resolve().parents[2] / "tools" / "layer_worth.py")
    resolved = resolve_source(run_dir, ["evaluation.num_questions=3"])
    questions = draw_questions(resolved.config.evaluation, "eval", "choice")
    with process_group(60):
        _, _, chunks, gate = load_for_inference(run_dir, resolved)
        stage = asking_stage(resolved, 104, 3)
        preparer = BatchPreparer(resolved, stage, needs_pixels=True)
        samples = [[preparer.prepare(0, record_of(question, False), stage.uncompressed)] for question in questions]
        batch = preparer.collate(samples, stage.uncompressed)
        with torch.no_grad():
            whole = chunks[0](batch, None)
            gate.set(SkipMask(0, 0, ((False, True, False, False),)))
            skipped = chunks[0](batch, None)
            gate.clear()
            with tool.without_layer(dict(named_weights(chunks)), 1):
                emptied = chunks[0](batch, None)
            assert torch.equal(chunks[0](batch, None), whole)
        groups.destroy()
    assert torch.equal(emptied, skipped) and not torch.equal(emptied, whole)
    out = tmp_path / "worth.json"
    tool.main([str(run_dir), "--num-questions", "4", "--families", "choice", "--out", str(out)])
    assert list(json.loads(out.read_text())) == ["whole", "0", "1", "2", "3"]
    assert "Accuracy lost, of 4 questions a family" in " ".join(capsys.readouterr().out.split())
