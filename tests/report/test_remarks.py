"""What ``report`` says in words: of a comparison, and of what is no run."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sts.cli import main
from megatron_sts.config.load import dump
from megatron_sts.config.resolve import resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.report.compare import markdown
from tests.report.test_report import CONFIG, STAGE, compared, line, write_run


@pytest.mark.parametrize(("num_steps", "said"), [(19, "at most a stage's"), (20, "a stage's")])
def test_of_how_many_losses_a_mean_is(tmp_path: Path, num_steps: int, said: str) -> None:
    written = {**CONFIG, "stages": [{"name": "finetune", **STAGE, "steps": num_steps}]}
    folders = [write_run(tmp_path / name, 1000, 2.0, 0.8, [line("finetune", step, 1.0, 1000) for step in range(num_steps)])
               for name in ("dense", "sts")]  # fmt: skip
    for folder in folders:
        dump(resolve(RunConfig.model_validate(written)), folder / "config.resolved.yaml")
    assert f"\nTraining losses are means of {said} last 20 steps.\n" in markdown(compared(*folders))


def test_losses_of_a_dense_end_are_whole(tmp_path: Path) -> None:
    """Tokens or layers were left out in all of alignment's steps, and not in the last 20 of finetune."""
    written = {**CONFIG, "stages": [{"name": name, **STAGE, "steps": 22} for name in ("alignment", "finetune")]}
    folders = []
    for name, flops in (("dense", 1000), ("sts", 600)):
        lines = [line("alignment", step, 1.0, flops) for step in range(22)]
        lines += [line("finetune", step, 1.0, flops if step < 2 else 1000) for step in range(22)]
        folders.append(write_run(tmp_path / name, 1000, 2.0, 0.8, lines))
        dump(resolve(RunConfig.model_validate(written)), folders[-1] / "config.resolved.yaml")
    said = "\nTraining losses are means of a stage's last 20 steps, in alignment with tokens or layers left out.\n"
    assert said in markdown(compared(*folders))


def test_totals_and_what_numbers_are(tmp_path: Path) -> None:
    """Sums over all stages, the mean of families, and what stands behind ± and tokens/s."""
    found = compared(write_run(tmp_path / "dense", 1000, 2.0, 0.8), write_run(tmp_path / "sts", 600, 1.5, 0.6))
    text, runs = markdown(found), [found["runs"][name] for name in ("dense", "sts")]
    for label, key, form in (("FLOPs", "flops_executed", "{:.3g}"), ("wall-clock", "wall_s", "{:.1f} s")):
        sums = [form.format(sum(stage[key] for stage in run["stages"].values())) for run in runs]
        assert f"| all stages: {label} | {sums[0]} | {sums[1]} |" in text
    assert "| accuracy: mean | 0.800 | 0.600 | 0.750 |" in text
    assert "\nAccuracies are on split `eval`, ± one standard error.\n" in text
    assert "; tokens/s count the tokens that VTC leaves, so that" in text


def test_a_folder_of_runs_is_not_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a sweep's, in which a comparison has left its picture."""
    run, picture = write_run(tmp_path / "dense", 1000, 2.0, 0.8), tmp_path / "comparison.png"
    picture.touch()
    for given, said in (
        ([tmp_path], f"{tmp_path}: holds runs: give them, for example {tmp_path}/*/"),
        ([picture, run], f"{picture}: is a file; give folders that train wrote, for example {tmp_path}/*/"),
        ([run, tmp_path / "none"], f"{tmp_path / 'none'}: holds no config.resolved.yaml; give the folder that train wrote (--run-dir)"),
    ):  # fmt: skip
        assert main(["report", *map(str, given)]) == 2
        assert capsys.readouterr().err == f"megatron-sts: error: {said}\n"
