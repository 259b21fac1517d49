"""The study's pages show what its kept results say."""

from __future__ import annotations

import csv
import importlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from megatron_sts.launch import outcome
from tests.report.test_overview import seeded
from tests.report.test_paired import group
from tests.report.test_report import CONFIG

ROOT = Path(__file__).resolve().parents[2]
STUDY = ROOT / "examples" / "study"


@pytest.fixture
def study_tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """As ``python tools/study_tables.py`` finds its neighbours."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("study_tables")


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_the_pages_have_the_tables_of_the_results(study_tables: ModuleType) -> None:
    missing = [
        sweep
        for sweep, of in study_tables.tables().items()
        if f"<!-- {sweep} -->\n{of}<!-- /{sweep} -->" not in study_tables.page_of(sweep).read_text()
    ]
    assert study_tables.tables() and not missing


def test_every_sweep_has_a_table_or_has_its_own(study_tables: ModuleType) -> None:
    known = {*study_tables.BESIDE, *study_tables.UNTABLED, "failures", "aligned", "smollm2_read"}
    assert known == {path.stem for path in STUDY.glob("sweeps/*.yaml")}
    assert not set(study_tables.UNTABLED) & set(study_tables.BESIDE)
    for cases in study_tables.BESIDE.values():
        assert all((STUDY / f"sweeps/{case.partition('/')[0]}.yaml").is_file() for case in cases)


def test_a_sweep_without_a_table_is_taken_once_it_is_done(
    study_tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_tables, "RESULTS", tmp_path)
    kept = STUDY / "results" / "last_rate.csv"
    (table := tmp_path / "runs" / "last_rate" / "results.csv").parent.mkdir(parents=True)
    assert not study_tables.collect_untabled(tmp_path / "runs", "last_rate")
    for content in (kept.read_text().replace(",done,", ",stopped,", 1), kept.read_text().replace("to-0-seed=2", "other", 1)):  # fmt: skip
        table.write_text(content)
        assert not study_tables.collect_untabled(tmp_path / "runs", "last_rate")
    table.write_text(kept.read_text())
    assert study_tables.collect_untabled(tmp_path / "runs", "last_rate")
    assert (tmp_path / "last_rate.csv").read_text() == kept.read_text()


def test_differences_are_those_of_seeds(
    study_tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 0.01, 0.02 and 0.03: t = 4.30 of 0.01 / sqrt(3)."""
    monkeypatch.setattr(study_tables, "RESULTS", tmp_path)
    losses = {"dense": (0.1, 0.2, 0.3), "lds": (0.11, 0.22, 0.33), "once": (0.15,)}
    rows = [
        {"run": f"{case}-seed={seed}", "seed": str(seed), "finetune.validation_loss": str(loss)}
        for case, found in losses.items()
        for seed, loss in enumerate(found)
    ]
    write_csv(tmp_path / "sweep.csv", rows)
    assert study_tables.validation_loss("sweep/dense", "sweep/dense") == "0.2000"
    assert study_tables.validation_loss("sweep/lds", "sweep/dense") == "+0.0200 ± 0.0248"
    assert study_tables.validation_loss("sweep/once", "sweep/dense") == "+0.0500"


def test_seconds_are_of_both_stages_and_all_seeds(
    study_tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_tables, "RESULTS", tmp_path)
    seconds = {"dense": ((10, 100), (20, 70)), "fast": ((5, 50), (15, 20))}
    rows = [
        {"run": f"{case}-seed={seed}", "seed": str(seed), "alignment.wall_s": str(one), "finetune.wall_s": str(two)}
        for case, found in seconds.items()
        for seed, (one, two) in enumerate(found)
    ]
    write_csv(tmp_path / "sweep.csv", rows)
    assert study_tables.seconds_of("sweep/dense", "sweep/dense") == "1"
    assert study_tables.seconds_of("sweep/fast", "sweep/dense") == "0.45"  # 90 of 200
    once = {"run": "once-seed=1", "seed": "1", "alignment.wall_s": "9", "finetune.wall_s": "9"}
    write_csv(tmp_path / "sweep.csv", [*rows, once, {**once, "run": "untold-seed=1", "finetune.wall_s": ""}])
    assert study_tables.seconds_of("sweep/once", "sweep/dense") == "0.20"  # 18 of the 90 of that seed
    assert study_tables.seconds_of("sweep/untold", "sweep/dense") == "n/a"


def test_results_are_taken_from_runs_that_are_done(
    study_tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Dense answers all, LDS every second question of one family; a third case has no seed in common with dense."""
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(study_tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study_tables, "STUDY", tmp_path)
    monkeypatch.setattr(study_tables, "BESIDE", {"first": (), "second": ("first/dense",)})
    monkeypatch.setattr(study_tables, "UNTABLED", ())
    all_right = np.ones(400, bool)
    every_second = {"ocr": np.arange(400) % 2 == 0, "paired": all_right}
    all_of_both = {"ocr": all_right, "paired": all_right}
    lds = [{**stage, "lds": {"alpha": 0.5}} for stage in CONFIG["stages"]]
    other = [{**stage, "lds": {"alpha": 0.3}} for stage in CONFIG["stages"]]
    (tmp_path / "runs/first").mkdir(parents=True)
    (tmp_path / "runs/second").mkdir()
    left_out = {"evaluation": {"left_out_of_mean": ["paired"]}}
    group(tmp_path / "runs/first", "dense", {1: all_of_both, 2: all_of_both}, **left_out)
    group(tmp_path / "runs/second", "lds", {1: every_second, 2: every_second}, stages=lds, **left_out)
    group(tmp_path / "runs/second", "other", {3: all_of_both}, stages=other, **left_out)
    done = [
        {"run": f"{case}-seed={seed}", "seed": str(seed), "status": "done"}
        for case, seed in (("dense", 1), ("dense", 2), ("lds", 1), ("lds", 2), ("other", 3))
    ]
    written = {"first": [row["run"] for row in done[:2]], "second": [row["run"] for row in done[2:]]}
    monkeypatch.setattr(study_tables, "run_names", written.__getitem__)
    write_csv(tmp_path / "runs/first/results.csv", done[:2])
    write_csv(tmp_path / "runs/second/results.csv", [*done[2:4], {**done[4], "status": "missing"}])
    assert study_tables.main(["--collect", str(tmp_path / "runs")]) == 0
    assert "second: not done" in capsys.readouterr().err
    write_csv(tmp_path / "runs/second/results.csv", done[2:4])  # some of its runs
    assert study_tables.main(["--collect", str(tmp_path / "runs")]) == 0
    assert "second: not done" in capsys.readouterr().err
    write_csv(tmp_path / "runs/second/results.csv", done[2:])
    assert study_tables.main(["--collect", str(tmp_path / "runs")]) == 0
    heads, _, dense, sparse, unpaired = study_tables.table("second").splitlines()
    assert heads == "|  | FLOPs | training loss | mean | ocr | paired |"
    assert dense == "| dense (first) | 1 | 1.500 | 1.000 | 1.000 | 1.000 |"
    found = re.fullmatch(
        r"\| lds \| 1.00 \| 1.500 \| 0.500 \[(0.4\d\d), (0.5\d\d)\] \| \*\*0.500\*\* \| 1.000 \|", sparse
    )
    assert found and float(found[1]) < 0.49 and float(found[2]) > 0.51
    assert unpaired == "| other | 1.00 | 1.500 | n/a | n/a | n/a |"
    capsys.readouterr()
    assert study_tables.main(["--collect", str(tmp_path / "runs"), "first"]) == 0
    assert capsys.readouterr().err.splitlines() == ["first: taken"]
    anew = [{**row, "eval.mean": "0.5"} for row in done[:2]]
    write_csv(tmp_path / "runs/first/results.csv", anew)
    written["first"].append("late-seed=1")
    capsys.readouterr()
    assert study_tables.main(["--collect", str(tmp_path / "runs"), "second"]) == 0
    told = "second: first/dense is not as it is kept: take its whole sweep first", "second: not done"
    assert capsys.readouterr().err.splitlines() == [*told]  # of no other sweep
    for wrong in (["--collect", str(tmp_path / "runs"), "third"], ["first"]):
        with pytest.raises(SystemExit):
            study_tables.main(wrong)
    said = capsys.readouterr().err
    assert "no sweep third; there are first, second" in said and "add --collect RUNS, or leave first out" in said
    (tmp_path / "tokens.md").write_text("<!-- second -->\n<!-- /second -->\n")
    with pytest.raises(SystemExit):  # there is no place for the first
        study_tables.main(["--write"])
    assert "from <!-- first --> to <!-- /first -->; found in: none" in capsys.readouterr().err
    for page in ("README.md", "layers.md"):
        (tmp_path / page).write_text("<!-- first -->\n<!-- /first -->\n")
    with pytest.raises(SystemExit):
        study_tables.main(["--write"])
    assert "from <!-- first --> to <!-- /first -->; found in: README.md, layers.md" in capsys.readouterr().err
    (tmp_path / "layers.md").unlink()
    (tmp_path / "README.md").write_text("<!-- first -->\n")
    with pytest.raises(SystemExit):  # no end
        study_tables.main(["--write"])
    assert "found in: none" in capsys.readouterr().err
    assert (tmp_path / "tokens.md").read_text() == "<!-- second -->\n<!-- /second -->\n"  # nothing is written by halves
    (tmp_path / "README.md").write_text("<!-- first -->\n<!-- /first -->\n")
    assert study_tables.main(["--write"]) == 0
    for page, sweep in (("README.md", "first"), ("tokens.md", "second")):
        assert study_tables.table(sweep) in (tmp_path / page).read_text()


def test_provoked_failures_are_taken_with_their_planted_mistakes(
    study_tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_tables, "RESULTS", tmp_path)
    runs = tmp_path / "failures"
    runs.mkdir()
    write_csv(runs / "results.csv", [{"run": "healthy", "seed": ""}])
    for name, accuracy in (("healthy", 0.9), ("residual-twice", 0.5), ("residual-lost", 0.25)):
        assert not study_tables.collect_failures(tmp_path)
        folder = seeded(runs / name, 1, accuracy)
        outcome.write(folder, "done")
    assert study_tables.collect_failures(tmp_path) and (tmp_path / "failures.png").is_file()
    shown = [line.split(" | ") for line in study_tables.failures_table().splitlines()[2:]]
    assert [cells[0] for cells in shown] == ["| healthy", "| residual added twice", "| residual lost"]
    assert [cells[4] for cells in shown] == ["0.900", "0.500", "0.250"]


def test_runs_are_those_of_the_file(study_tables: ModuleType) -> None:
    for sweep in study_tables.BESIDE:
        kept = STUDY / "results" / f"{sweep}.csv"
        if kept.is_file():
            assert study_tables.run_names(sweep) == [row["run"] for row in study_tables.rows_of(kept)]


def test_it_runs_as_the_readme_says() -> None:
    done = subprocess.run(
        [sys.executable, "tools/study_tables.py"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and "| sts-anchored |" in done.stdout, done.stderr


def test_an_epoch_is_the_mean_of_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two epochs of two steps, of two layers in two micro-batches; the second run has one epoch and skips nothing."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    study_course = importlib.import_module("study_course")

    def run(epochs: int, seed: int, layer_runs: list[list[int]], num_steps: int | None = None) -> SimpleNamespace:
        steps = [
            {"loss": 1.0 + n, "grad_norm": 3.0 * n, "layer_runs": runs, "num_microbatches": 2}
            for n, runs in enumerate(layer_runs)
        ]
        validations = [{"step": n, "loss": n / 8} for n in range(1, len(steps) + 1)]
        config = {"seed": seed, "stages": [{"epochs": float(epochs)}]}
        return SimpleNamespace(
            config=config, steps={"finetune": steps}, validations={"finetune": validations}, num_steps=lambda _: num_steps or len(steps)
        )  # fmt: skip

    runs = {"lds-seed=1": run(2, 1, [[2, 0], [2, 2], [2, 1], [2, 1]]), "dense-seed=2": run(1, 2, [[2, 2], [2, 2]])}
    monkeypatch.setattr(study_course, "read_run", lambda folder: runs[folder.name])
    study_course.write(map(Path, runs), tmp_path / "course.csv")
    assert (tmp_path / "course.csv").read_text().splitlines() == [
        "run,seed,epoch,loss,validation_loss,gradient_norm,layers_executed",
        "lds-seed=1,1,1,1.5,0.25,1.5,0.75",
        "lds-seed=1,1,2,3.5,0.5,7.5,0.75",
        "dense-seed=2,2,1,1.5,0.25,1.5,1",
    ]
    study_course.write_losses([Path("lds-seed=1")], tmp_path / "losses.csv", "finetune")
    assert (tmp_path / "losses.csv").read_text() == "step,lds-seed=1\n1,1\n2,2\n3,3\n4,4\n"
    assert study_course.table(tmp_path / "course.csv").splitlines()[2:] == [
        "| validation loss at its end, lds | 0.250 | 0.500 |",
        "| validation loss at its end, dense | 0.250 |  |",
        "| norm of gradients, lds | 1.500 | 7.500 |",
        "| norm of gradients, dense | 1.500 |  |",
        "| layers executed, lds | 0.750 | 0.750 |",
    ]
    runs |= {"thin": run(1, 1, [[2, 2], [2, 2]], num_steps=4), "odd": run(2, 1, [[2, 2]] * 3)}
    with pytest.raises(ValueError, match="thin: 2 lines are not of every one of 4 steps"):
        study_course.course_of(Path("thin"))
    with pytest.raises(ValueError, match="odd: 3 steps are no whole number of each of 2 epochs"):
        study_course.course_of(Path("odd"))


def test_the_grid_has_shares_of_its_dense_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "tools")
    runs = {("no-lds", "1"): (0.8, 100, 300), ("no-lds", "0.5"): (0.7, 60, 300), ("alpha0.3", "1"): (0.6, 100, 200), ("alpha0.3", "0.5"): (0.88, 60, 200)}  # fmt: skip
    names = ("eval.mean", "alignment.flops_executed", "finetune.flops_executed")
    keys = ("case", "stages.alignment.vtc.keep_ratio")
    write_csv(
        tmp_path / "grid.csv",
        [
            {**dict(zip(keys, key, strict=True)), **dict(zip(names, map(str, found), strict=True))}
            for key, found in runs.items()
        ],
    )
    assert importlib.import_module("study_grid").table(tmp_path / "grid.csv").splitlines() == [
        "| keep ratio | 1 | 0.5 |",
        "| --- | ---: | ---: |",
        "| no-lds | 1.000 at 1.00 | 0.875 at 0.90 |",
        "| alpha0.3 | 0.750 at 0.75 | 1.100 at 0.65 |",
    ]
    write_csv(tmp_path / "seeds.csv", [{"case": "no-lds", keys[1]: "1", "seed": seed} for seed in ("1", "2")])
    with pytest.raises(ValueError, match="several runs of one setting"):
        importlib.import_module("study_grid").table(tmp_path / "seeds.csv")
