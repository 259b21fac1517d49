"""Many runs beside each other: what they spent, which of them are one, their intervals, and the page."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import replace
from glob import glob
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from scipy import stats

import megatron_sts
from megatron_sts.cli import main
from megatron_sts.config.load import dump
from megatron_sts.config.resolve import resolve
from megatron_sts.config.schema import RunConfig
from megatron_sts.report.course import courses, smoothed
from megatron_sts.report.expected import bins_of, executed_layers
from megatron_sts.report.figures import as_pixels
from megatron_sts.report.groups import T_95, grouped, left_out_of_means
from megatron_sts.report.kept_figure import DIMMED, KeptTokens, dimmed, kept_figure
from megatron_sts.report.run import read_run
from megatron_sts.report.several_figures import accuracy_figure, pareto_front
from tests.report.test_report import CONFIG, line, write_run


def seeded(folder: Path, seed: int, accuracy: float, **changes: Any) -> Path:
    write_run(folder, 1000, 2.0, accuracy)
    dump(resolve(RunConfig.model_validate({**CONFIG, **changes, "seed": seed})), folder / "config.resolved.yaml")
    return folder


def test_what_was_spent_until_a_step(tmp_path: Path) -> None:
    """Every second step of alignment has a line; of finetune each, one of them without a loss."""
    lines = [*(line("alignment", step, 3.0, 10 * step) for step in (1, 3)), line("finetune", 0, 1.0, 5, loss=None), line("finetune", 1, 1.0, 5)]  # fmt: skip
    run = read_run(write_run(tmp_path / "run", 1, 1.0, 0.5, lines))
    found = courses(run)
    assert found["alignment"].steps.tolist() == [2, 4] and found["finetune"].steps.tolist() == [5, 6]
    assert found["alignment"].flops.tolist() == [20, 80] and found["finetune"].flops.tolist() == [85, 90]
    assert found["finetune"].seconds.tolist() == [13, 14] and run.total("step_time_s") == 14
    assert run.total("flops_executed", "alignment") == 80
    assert np.isnan(found["finetune"].losses[0]) and found["finetune"].losses[1] == 1.0


def test_a_running_mean_leaves_gaps_out() -> None:
    values = np.array([np.nan, 1.0, 3.0, np.nan, np.nan, np.nan, 8.0])
    for window in (1, 2, 3, 9):
        parts = [values[max(0, end - window) : end] for end in range(1, len(values) + 1)]
        wanted = [np.mean(part[np.isfinite(part)]) if np.isfinite(part).any() else np.nan for part in parts]
        np.testing.assert_allclose(smoothed(values, window), wanted)


def test_seeds_of_one_config_are_one_group(tmp_path: Path) -> None:
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
    stages = [{**stage, "lds": {"alpha": 0.3}} for stage in CONFIG["stages"]]
    folders = [
        seeded(tmp_path / "a" / "dense-seed=1", 1, 0.8),
        seeded(tmp_path / "b" / "dense-seed=1", 1, 0.4, stages=stages),
        seeded(tmp_path / "a" / "dense-seed=2", 2, 0.6),
    ]
    groups = grouped([read_run(folder) for folder in folders])
    assert [(group.label, len(group.runs)) for group in groups] == [("a/dense", 2), ("b/dense", 1)]
    found = groups[0].accuracies(frozenset())["mean"]
    low, high = stats.t.interval(0.95, 1, loc=0.7, scale=stats.sem([0.8, 0.6]))
    assert (found.mean, found.low, found.high) == pytest.approx((0.7, low, high), abs=1e-3)
    # One seed: six families of standard error 0.05, told apart by their questions alone.
    single = groups[1].accuracies(frozenset())
    assert single["mean"].high - 0.4 == pytest.approx(1.96 * 0.05 / 6**0.5)
    assert single["ocr"].high - 0.4 == pytest.approx(1.96 * 0.05)


def test_a_seed_that_ran_twice_and_a_run_that_goes_on_say_no_more(tmp_path: Path) -> None:
    """Costs are of complete runs, intervals of different seeds; families of one picture each have a place."""
    runs = [read_run(seeded(tmp_path / f"sts-{number}", seed, 0.8)) for number, seed in enumerate((1, 1, 2))]
    runs[1] = replace(runs[1], evaluation=json.loads(json.dumps(runs[1].evaluation).replace("0.8", "0.6")))
    going_on = read_run(seeded(tmp_path / "sts-3", 3, 0.1))
    going_on = replace(
        going_on, steps={"alignment": going_on.steps["alignment"]}
    )  # its evaluation is of before an extension
    [group] = grouped([*runs, going_on])
    assert group.of_runs("flops_executed") == 4000 and list(group.seeds) == [1, 2, 3]
    low, high = stats.t.interval(0.95, 1, loc=0.75, scale=stats.sem([0.7, 0.8]))
    found = group.accuracies(frozenset())["ocr"]
    assert (found.mean, found.low, found.high) == pytest.approx((0.75, low, high), abs=1e-3)
    axes = accuracy_figure([group], [group.accuracies(frozenset())]).axes
    assert [each.axison for each in axes] == [True] * 7 + [False]


def test_runs_that_were_asked_differently_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [seeded(tmp_path / f"run-{seed}", seed, 0.5) for seed in (1, 2, 3)]
    other = json.loads((folders[2] / "evaluation.json").read_text())
    other["settings"]["words"] = True
    (folders[2] / "evaluation.json").write_text(json.dumps(other))
    assert main(["report", *map(str, folders), "--out", str(tmp_path / "out")]) == 2
    assert "run-3: its first accuracies are of in words=True" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not (folders[0] / "report.html").exists()


def test_a_sweep_of_two_seeds_one_of_which_has_just_begun(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """By the README's command, twice; the sweep's tables lie beside its runs."""
    monkeypatch.chdir(tmp_path)
    Path("runs/sweep").mkdir(parents=True)
    for name in ("results.csv", "results.jsonl"):
        Path("runs/sweep", name).touch()
    seeded(Path("runs/sweep/dense-seed=1"), 1, 0.5)
    begun = seeded(Path("runs/sweep/dense-seed=2"), 2, 0.5)
    (begun / "metrics.jsonl").write_text("")
    (begun / "evaluation.json").unlink()
    lds = [{**stage, "lds": {"alpha": 0.5}} for stage in CONFIG["stages"]]
    text = (Path(megatron_sts.__file__).parent / "report/README.md").read_text()
    [command] = re.findall(
        r"^megatron-sts (report runs/sweep.*) --kept 4$", text, re.MULTILINE
    )  # these have no weights
    for _ in range(2):
        words = [each for word in command.split() for each in (sorted(glob(word)) if "*" in word else [word])]
        assert main(words) == 0
    with Path("runs/sweep-report/overview.csv").open() as file:
        [row] = csv.DictReader(file)
    assert (row["runs"], row["seeds"]) == ("dense", "2")
    other = seeded(tmp_path / "other", 3, 0.5, stages=lds)
    (other / "metrics.jsonl").write_text("")
    assert main(["report", str(other), "--out", str(tmp_path / "out")]) == 0
    assert not [warning for warning in recwarn if "legend" in str(warning.message)]
    (other / "evaluation.json").write_text("{")
    assert main(["report", str(other)]) == 2
    assert f"{other}/evaluation.json: is damaged" in capsys.readouterr().err


def test_labels_tell_groups_apart_that_differ_in_more_than_the_seed_in_their_names(tmp_path: Path) -> None:
    lds = [{**stage, "lds": {"alpha": 0.3}} for stage in CONFIG["stages"]]
    folders = [seeded(tmp_path / "run-seed=1", 1, 0.5), seeded(tmp_path / "run-seed=2", 2, 0.5, stages=lds)]
    assert [group.label for group in grouped([read_run(each) for each in folders])] == ["run-seed=1", "run-seed=2"]


def test_students_t() -> None:
    assert pytest.approx([stats.t.ppf(0.975, degrees) for degrees in range(1, len(T_95) + 1)], abs=5e-3) == list(T_95)


def test_families_that_not_all_were_asked_are_no_part_of_means(tmp_path: Path) -> None:
    [whole] = grouped([read_run(seeded(tmp_path / "whole", 1, 0.8))])
    assert left_out_of_means([whole]) == frozenset()
    run = read_run(seeded(tmp_path / "part", 1, 0.8, evaluation={"left_out_of_mean": ["counting"]}))
    assert run.evaluation is not None
    fewer = {name: found for name, found in run.evaluation["splits"]["eval"].items() if name != "ocr"}
    part = replace(whole, runs=[replace(run, evaluation={**run.evaluation, "splits": {"eval": fewer}})])
    left_out = left_out_of_means([whole, part])
    assert left_out == {"ocr", "counting"}
    assert set(part.accuracies(left_out)) == {*fewer, "mean"}


def test_nothing_on_the_front_is_beaten_by_something_cheaper() -> None:
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.4), (2.0, 0.7), (4.0, 0.9)]
    assert pareto_front(points) == [(1.0, 0.5), (2.0, 0.7), (3.0, 0.9)]


def test_layers_by_depth_and_time(tmp_path: Path) -> None:
    """81 steps in 40 bins; layer 0 always runs, layer 1 in the first 27 steps, and step 5 has no line."""
    lines = [
        line("finetune", step, 1.0, 1, layer_runs=[2, 2 * (step < 27)], num_microbatches=2)
        for step in range(81)
        if step != 5
    ]
    shares = executed_layers(read_run(write_run(tmp_path / "run", 1, 1.0, 0.5, lines)), "finetune")
    borders = bins_of(81)
    assert shares.shape == (40, 2) and np.all(shares[:, 0] == 1)
    wanted = [np.mean([step < 27 for step in range(*pair)]) for pair in pairwise(borders)]
    np.testing.assert_allclose(shares[:, 1], wanted)


def test_dropped_patches_are_dark() -> None:
    pixels = np.full((6, 4, 3), 255, np.uint8)
    bright = dimmed(KeptTokens(pixels, "", {}, 4), [1, 2])[..., 0]
    assert np.array_equal(bright, np.kron([[DIMMED, 1.0], [1.0, DIMMED]], np.ones((3, 2))))


@pytest.mark.parametrize("question", ["is it $5 or $6 ?", r"is \foo in $ or $ ?"])
def test_a_question_about_dollars_is_no_formula(question: str) -> None:
    """Drawn as matplotlib itself draws it with each $ escaped."""
    pixels = np.full((6, 4, 3), 255, np.uint8)
    ours, escaped = (kept_figure([KeptTokens(pixels, text, {"random": [1]}, 4)], text) for text in (question, question.replace("$", r"\$")))  # fmt: skip
    canvas = FigureCanvasAgg(escaped)
    canvas.draw()
    assert np.array_equal(as_pixels(ours), np.asarray(canvas.buffer_rgba())[..., :3])


def test_the_page_of_many_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    planned = {"event": "skipping", "stage": "finetune", "executed_planned": [0.5] * 4, "layer_owner": [0] * 4}
    more = {
        "layer_runs": [4, 4, 4, 0],
        "num_microbatches": 4,
        "grad_norm": 1.5,
        "visual_tokens_in": 4,
        "visual_tokens_out": 1,
    }
    stages = [{**stage, "lds": {"alpha": 0.5}} for stage in CONFIG["stages"]]
    folders = []
    for seed, accuracy in ((1, 0.6), (2, 0.62), (3, 0.64)):
        folders.append(seeded(tmp_path / f"sts-seed={seed}", seed, accuracy, stages=stages))
        lines = [
            planned,
            *(line(stage, step, 1.0, 700, **more) for stage in ("alignment", "finetune") for step in (0, 1)),
        ]
        (folders[-1] / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    folders.append(seeded(tmp_path / "dense-seed=1", 1, 0.7))
    unfinished = seeded(tmp_path / "dense-seed=2", 2, 0.7)
    (unfinished / "evaluation.json").unlink()
    assert main(["report", *map(str, [*folders, unfinished]), "--out", str(tmp_path / "out")]) == 0
    assert str(tmp_path / "out" / "overview.html") in capsys.readouterr().out
    page = (tmp_path / "out" / "overview.html").read_text()
    assert page.count("<svg") == 4 and "<script" not in page and "<link" not in page
    assert "0.620 (0.570 to 0.670)" in page  # t = 4.303 of 0.02 / sqrt(3)
    with (tmp_path / "out" / "overview.csv").open() as file:
        rows = {row["runs"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["sts", "dense"] and (rows["sts"]["seeds"], rows["dense"]["seeds"]) == ("3", "2")
    assert float(rows["sts"]["flops_executed"]) == 2800 and float(rows["dense"]["mean"]) == 0.7
    pictures = {"loss", "gradient_norm", "accuracy_against_flops", "executed_layers"}
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == pictures
