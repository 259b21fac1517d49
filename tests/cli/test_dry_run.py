"""``train --dry-run``: what a run will come to, what stands in its way here, and what its writer may not have meant."""

import json
import re
import sys
from pathlib import Path

import pytest
import yaml

from megatron_sts.cli import main
from megatron_sts.config.load import dump, load
from megatron_sts.config.resolve import resolve


def test_dry_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["parallel.pipeline_model_parallel_size=2"]
    assert main(["train", str(config), *overrides, "--dry-run", "--json", "parallel.data_parallel_size=2"]) == 0
    outline = json.loads(capsys.readouterr().out)
    assert outline["world_size"] == 4
    assert outline["layers_per_chunk"] == [[2, 2]]
    assert outline["stages"][0]["num_microbatches"] == 2
    assert outline["stages"][0]["tokens_per_step"] == 256
    assert len(outline["parameters_per_rank"]) == len(outline["stages"][0]["state_bytes_per_rank"]) == 2
    assert all(
        peak > state
        for stage in outline["stages"]
        for state, peak in zip(stage["state_bytes_per_rank"], stage["peak_bytes_per_rank"], strict=True)
    )
    assert sum(outline["parameters_per_rank"]) == sum(outline["parameters"].values())
    stage = outline["stages"][0]
    assert stage["flops_per_step_dense"] == stage["flops_per_step_all_layers"] == stage["flops_per_step_mean"] > 0
    assert outline["context_bytes"] == 2 * 2**30
    assert main(["train", str(config), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "FLOPs a step" in said and "with 2 GiB assumed for CUDA and NCCL" in " ".join(said.split())
    verdict = r"sound: it can start here, if there is room for 1 rank \(on a GPU up to 2\.\d\d GiB each\)"
    assert re.fullmatch(verdict, said.splitlines()[-1])


def test_dry_run_names_obstacles(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, tokenizer = "model.language.init=no.safetensors", "data.tokenizer=nowhere"
    assert main(["train", str(config), weights, tokenizer, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["obstacles"]
    assert [(entry["problem"].split(": ")[0], entry["of_this_machine"]) for entry in found] == [
        (weights, True),
        (tokenizer, True),
    ]
    assert main(["train", str(config), weights, tokenizer, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"Will not start on this machine: {weights}" in said
    assert said.endswith(f"\nsound, but it cannot start here with {weights}, {tokenizer}\n")


def test_dry_run_notes_numbers_of_steps_that_no_stage_has(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for interval, every, noted in ((4, 8, [8]), (5, 10, [5, 10])):
        words = ["stages.only.steps=4", f"checkpoint={{interval_steps: {interval}, keep_every_steps: {every}}}"]
        assert main(["train", str(config), *words, "--dry-run", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["notes"]
        assert [line.partition(": ")[2] for line in found] == [
            "no stage has more than 4 steps, so that "
            + ("it keeps nothing" if number == every else "only the ends of stages are saved")
            for number in noted
        ]


def test_dry_run_notes_what_validation_costs(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "stages.only.steps=5",
        "stages.only.freeze=[]",
        "stages.only.validation={interval_steps: 2, num_samples: 30}",
    ]
    assert main(["train", str(config), *words, "--dry-run"]) == 0
    size = load(config, []).stages[0].batch.global_batch_size
    # A forward pass is a third of a step in which all learns, and half of its attention's part two fifths of that.
    [share] = re.findall(r"validation: 3 times 30 samples, about ([\d.]+)% of what", capsys.readouterr().out)
    assert 0.3 < float(share) / 100 / (3 * 30 / size / 5) < 0.4


def test_dry_run_notes_blocks_that_no_schedule_can_leave_out(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rounds, vpp, is_noted in ((4, 1, True), (4, 2, True), (2, 2, False)):
        sizes = ["pipeline_model_parallel_size=2", f"virtual_pipeline_model_parallel_size={vpp if vpp > 1 else 'null'}"]
        words = [f"parallel.{size}" for size in sizes] + [f"stages.only.lds={{sampler: rounds, rounds: {rounds}}}"]
        assert main(["train", str(config), *words, "--dry-run"]) == 0
        noted = (
            f"Note: stages.only.lds.rounds={rounds}: blocks of layers that are no whole rounds of this layout's {vpp}"
        )
        assert (noted in capsys.readouterr().out) == is_noted


def test_dry_run_notes_layers_that_hardly_run(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parallel = "parallel={pipeline_model_parallel_size: 2, virtual_pipeline_model_parallel_size: 2}"
    for more, noted in (
        ("", ["lds.sampler=rounds: skips layer "]),
        (", head_yields: off", []),
        (
            ", residual_scale: inverse_keep, alpha: 0.66",
            ["lds.sampler=rounds: skips layer ", "inverse_keep: multiplies what layer "],
        ),
        (", residual_scale: inverse_keep, alpha: 0.1", []),
    ):
        lds = "stages.only.lds={sampler: rounds" + more + "}"
        assert main(["train", str(config), parallel, lds, "--dry-run", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["notes"]
        assert len(found) == len(noted) and all(word in line for word, line in zip(noted, found, strict=True)), found


def test_dry_run_names_missing_devices(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A config for GPUs can be looked at anywhere; a start refuses it with the same line."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for override in ("precision.fp8=tensorwise", "kernels.layers=transformer-engine", "kernels.optimizer=apex"):
        assert main(["train", str(config), override, "--dry-run", "--json"]) == 0
        [found] = json.loads(capsys.readouterr().out)["obstacles"]
        assert found["problem"].startswith(f"{override}: ") and found["of_this_machine"]
        assert main(["train", str(config), override]) == 2
        assert capsys.readouterr().err == f"megatron-sts: error: {found['problem']}\n"


def test_dry_run_names_towers_that_cannot_be_built(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower = (
        "model.vision={tower: hf, num_layers: 2, hidden_size: 32, num_attention_heads: 4, image_size: 16, patch_size: 8, "
        "pixel_mean: [0.5, 0.5, 0.5], pixel_std: [0.5, 0.5, 0.5], hf_config: {model_type: %s}}"
    )
    for model_type, said in (("nonsense", "transformers knows no such model"), ("vit_mae", "use a plain ViT")):
        assert main(["train", str(config), tower % model_type, "--dry-run", "--json"]) == 2  # no machine could start it
        printed = capsys.readouterr()
        [found] = json.loads(printed.out)["obstacles"]
        assert said in found["problem"] and not found["of_this_machine"]
        assert printed.err == f"megatron-sts: error: {found['problem']}\n"


def test_a_package_that_is_missing_here_may_be_there_elsewhere(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    tower = (
        "model.vision={tower: hf, num_layers: 2, hidden_size: 32, num_attention_heads: 4, image_size: 16, patch_size: 8, "
        "pixel_mean: [0.5, 0.5, 0.5], pixel_std: [0.5, 0.5, 0.5], hf_config: {model_type: vit}}"
    )
    assert main(["train", str(config), tower, "--dry-run", "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)["obstacles"]
    assert "needs transformers" in found["problem"] and found["of_this_machine"]


def test_dry_run_names_another_run(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whose checkpoints lie where this one would be written."""
    checkpoint = tmp_path / "run" / "checkpoints" / "0-only-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "progress.json").write_text('{"stage": 0, "step": 1}')
    dump(resolve(load(config)), tmp_path / "run" / "config.resolved.yaml")
    words = ["train", str(config), "--run-dir", str(tmp_path / "run"), "seed=7"]
    assert main([*words, "--dry-run", "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)["obstacles"]
    assert found["problem"].startswith("seed=7: ") and "holds a run with seed=" in found["problem"]


def test_weights_and_tokenizers_that_do_not_fit_are_obstacles(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named by a dry run and refused by a run, before it writes anything or starts ranks."""
    weights = tmp_path / "weights"
    weights.mkdir()
    language = yaml.safe_load(config.read_text())["model"]["language"]
    (weights / "config.yaml").write_text(yaml.safe_dump({"model": {"language": language | {"rotary_base": 500000}}}))
    words = [str(config), f"model.language.init={weights}", "model.language.vocab_size=64"]
    assert main(["train", *words, "--dry-run", "--json"]) == 2
    found = json.loads(capsys.readouterr().out)["obstacles"]
    assert not any(entry["of_this_machine"] for entry in found)
    other_model, small_vocabulary = (entry["problem"] for entry in found)
    assert other_model == (
        f"model.language.rotary_base=10000: the weights in {weights} were made with 500000; correct it"
    )
    assert small_vocabulary.startswith("model.language.vocab_size=64: tokenizer scenes of stage only has ")
    assert main(["train", *words, "--dry-run"]) == 2
    verdict = "not sound: it can start nowhere with model.language.rotary_base=10000, model.language.vocab_size=64"
    assert capsys.readouterr().out.splitlines()[-1] == verdict
    assert main(["train", *words, "--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == f"megatron-sts: error: {other_model}\n"
    assert not (tmp_path / "run").exists()


def test_dry_run_counts_what_is_skipped(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fixed = "stages.only.lds={sampler: fixed, fixed_layers: [0, 1]}"
    assert main(["train", str(config), "--dry-run", "--json", fixed]) == 0
    stage = json.loads(capsys.readouterr().out)["stages"][0]
    assert stage["mean_skip_fraction"] == 0.5
    assert stage["flops_per_step_mean"] < stage["flops_per_step_all_layers"]


def test_dry_run_knows_that_dense_steps_skip_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Half of the steps with all tokens and all layers: the mean of two stages that are all of one kind. Means of both, multiplied, are less."""
    part, found = "stages.finetune", {}
    lds = "alpha: 0.5, epsilon: 0.5, schedule: piecewise, schedule_points"
    vtc = "keep_ratio: 0.25, schedule: piecewise, schedule_points"
    for name, (begin, middle) in {"sparse": (0.25, 0.25), "mixed": (0.25, 1), "dense": (1, 1)}.items():
        words = [
            str(Path(__file__).parents[2] / "examples" / "quickstart"),
            f"{part}.steps=10",
            f"{part}.optimizer.warmup_steps=1",
        ]
        words += [f"{part}.vtc={{{vtc}: [[0, {begin}], [0.4, {begin}], [0.5, {middle}]]}}"]
        words += [f"{part}.lds={{{lds}: [[0, {int(begin < 1)}], [0.4, {int(begin < 1)}], [0.5, {int(middle < 1)}]]}}"]
        assert main(["train", *words, "--dry-run", "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)["stages"][1]
    assert found["dense"]["flops_per_step_mean"] == found["dense"]["flops_per_step_dense"]
    halves = (found["sparse"]["flops_per_step_mean"] + found["dense"]["flops_per_step_mean"]) / 2
    assert found["mixed"]["flops_per_step_mean"] == pytest.approx(halves, abs=2)  # each is rounded
    assert found["mixed"]["mean_skip_fraction"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("where", "said"), [(None, "on all ranks of a model copy"), ("first", "on the first pipeline stage")]
)
def test_dry_run_says_where_the_tower_runs(where: str | None, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", str(Path(__file__).parents[2] / "examples" / "quickstart"), "--dry-run"]
    words += ["parallel.data_parallel_size=1", "parallel.pipeline_model_parallel_size=2"]
    words += [] if where is None else [f"parallel.vision={where}"]
    assert main(words) == 0
    assert f"Vision tower: {said}" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["vision_tower"] == (where or "spread")


def test_dry_run_names_a_missing_folder_of_pictures(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config), "data.image_dir=nowhere", "--dry-run", "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)["obstacles"]
    assert found["of_this_machine"] and found["problem"].startswith("data.image_dir=nowhere: no such folder; ")
