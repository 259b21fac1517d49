"""The study's README shows what its kept results say."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.report.test_overview import seeded
from tests.report.test_report import CONFIG
from tools import study_tables
from tools.study_tables import BESIDE, STUDY, kept, main, table, validation_loss


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_the_readme_has_the_tables_of_the_results() -> None:
    text = (STUDY / "README.md").read_text()
    assert [f"<!-- {sweep} -->\n{table(sweep)}<!-- /{sweep} -->" in text for sweep in kept()] == [True] * len(list(kept()))  # fmt: skip


def test_every_sweep_has_a_table_or_has_its_own() -> None:
    assert {*BESIDE, "recipes", "aligned"} == {path.stem for path in STUDY.glob("sweeps/*.yaml")}
    for cases in BESIDE.values():
        assert all((STUDY / f"sweeps/{case.partition('/')[0]}.yaml").is_file() for case in cases)


def test_differences_are_those_of_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 0.01, 0.02 and 0.03: t = 4.30 of 0.01 / sqrt(3)."""
    monkeypatch.setattr(study_tables, "RESULTS", tmp_path)
    losses = {"dense": (0.1, 0.2, 0.3), "lds": (0.11, 0.22, 0.33), "once": (0.15,)}
    rows = [
        {"run": f"{case}-seed={seed}", "seed": str(seed), "finetune.validation_loss": str(loss)}
        for case, found in losses.items()
        for seed, loss in enumerate(found)
    ]
    write_csv(tmp_path / "sweep.csv", rows)
    assert validation_loss("sweep/dense", "sweep/dense") == "0.2000"
    assert validation_loss("sweep/lds", "sweep/dense") == "+0.0200 ± 0.0248"
    assert validation_loss("sweep/once", "sweep/dense") == "+0.0500"


def test_results_are_taken_from_runs_that_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results").mkdir()
    monkeypatch.setattr(study_tables, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study_tables, "BESIDE", {"first": (), "second": ("first/dense",)})
    stages = [{**stage, "lds": {"alpha": 0.5}} for stage in CONFIG["stages"]]
    for sweep, case, more in (("first", "dense", {}), ("second", "lds", {"stages": stages})):
        (tmp_path / "runs" / sweep).mkdir(parents=True)
        rows = []
        for seed in (1, 2):
            run = seeded(tmp_path / "runs" / sweep / f"{case}-seed={seed}", seed, 0.5, **more)
            rows.append({"run": run.name, "seed": str(seed), "status": "done" if sweep == "first" or seed == 1 else "missing"})  # fmt: skip
        write_csv(tmp_path / "runs" / sweep / "results.csv", rows)
    assert main(["--collect", str(tmp_path / "runs")]) == 0
    assert "second: not done" in capsys.readouterr().err
    write_csv(tmp_path / "runs/second/results.csv", [{**row, "status": "done"} for row in rows])
    assert main(["--collect", str(tmp_path / "runs")]) == 0
    [heads, _, dense, lds] = table("second").splitlines()
    assert heads.startswith("|  | FLOPs | last loss | mean |")
    assert dense.startswith("| dense (first) | 1 |") and lds.startswith("| lds | ")
