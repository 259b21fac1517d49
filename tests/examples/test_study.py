"""The study's sweeps: every run of each could start, and what they hold equal is equal. Trains next to nothing."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron_sts.commands.sweep import check
from megatron_sts.commands.sweep_costs import planned_flops
from megatron_sts.config.load import load
from megatron_sts.config.resolve import Resolved, resolve
from megatron_sts.config.sweep import SweepRun, config_of, read, runs_of
from megatron_sts.lds.gate import SkipGate
from megatron_sts.lds.mask import SkipMask, draw_mask
from megatron_sts.lds.placement import placement
from megatron_sts.lds.schedule import mean_skip_fraction, skip_probabilities
from megatron_sts.mcore.layer import SkippableTransformerLayer
from megatron_sts.report.run import read_run
from tests import warm
from tests.examples.adopting import load_script

STUDY = Path(__file__).resolve().parents[2] / "examples" / "study"
SWEEPS = sorted((STUDY / "sweeps").glob("*.yaml"))
TINY = [
    "model.vision.init=null", "model.language.init=null", "model.vision.num_layers=1", "evaluation.num_questions=0",
    *(f"stages.{stage}.{key}" for stage in ("alignment", "finetune") for key in ("batch.global_batch_size=2", "batch.micro_batch_size=2", "optimizer.warmup_steps=1")),
    "stages.alignment.steps=1", "stages.finetune.steps=8", "stages.finetune.optimizer.lr=1e-9", "stages.finetune.optimizer.min_lr=0",
]  # fmt: skip


def resolved(path: Path) -> dict[str, tuple[SweepRun, Resolved]]:
    """All runs of a sweep file by name; ``check`` refuses one that could not start."""
    sweep = read(path)
    runs = runs_of(sweep)
    return {run.name: (run, found) for run, found in zip(runs, check(config_of(sweep, path), runs), strict=True)}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_run_could_start_and_is_counted_in_the_readme(path: Path) -> None:
    """Names of runs and FLOPs are what the README's table says, to its digits."""
    runs = resolved(path)
    [row] = [line for line in (STUDY / "README.md").read_text().splitlines() if line.startswith(f"| [{path.stem}](")]
    _, _, num_runs, flops = [cell.strip() for cell in row.strip("|").split("|")][:4]
    assert len(runs) == int(num_runs)
    assert f"{sum(planned_flops(found) for _, found in runs.values()):.2g}" == flops


def test_every_sweep_is_in_the_readme_and_all_of_them_there_exist() -> None:
    named = re.findall(r"^\| \[(\w+)\]\(sweeps/\1\.yaml\)", (STUDY / "README.md").read_text(), re.M)
    assert sorted(named) == [path.stem for path in SWEEPS]


def test_totals_are_those_of_the_sweeps() -> None:
    text = (STUDY / "README.md").read_text()
    rows = [line.split("|") for line in text.splitlines() if re.match(r"\| \[\w+\]\(sweeps/", line)]
    [(num_runs, flops, hours)] = re.findall(r"All (\d+) runs together are about (\S+) FLOPs, ([\d.]+) hours", text)
    assert int(num_runs) == sum(int(row[3]) for row in rows)
    assert float(flops) == pytest.approx(sum(float(row[4]) for row in rows), rel=0.01)
    assert float(hours) == pytest.approx(sum(int(row[5]) for row in rows) / 60, abs=0.051)


def test_schedules_skip_the_same_share_of_layers() -> None:
    shares = {}
    for name, (_, run) in resolved(STUDY / "sweeps" / "schedules.yaml").items():
        [stage] = run.stages
        assert stage.config.lds is not None
        shares[name] = mean_skip_fraction(stage.config.lds, stage.num_steps, 12)
    assert all(share == pytest.approx(1 / 6, rel=0.02) for share in shares.values()), shares


def test_the_page_says_how_often_layers_run() -> None:
    """Of the masks that the runs drew, which follow from their seeds, and of the schedule that they were drawn from."""
    runs = {**resolved(STUDY / "sweeps" / "utilisation.yaml"), **resolved(STUDY / "sweeps" / "schedules.yaml")}
    ran, planned = [], []
    for name in ("alpha0.3-seed=1", "paper-seed=1", "alpha0.66-seed=1"):
        run = runs[name][1]
        [stage] = run.stages
        assert stage.config.lds is not None
        steps, lds, place = range(stage.num_steps), stage.config.lds, placement(run, stage)
        masks = [draw_mask(lds, run.config.seed, 0, n, stage.num_steps, place, stage.num_microbatches) for n in steps]
        ran.append(np.array([1 - np.mean(mask.rows, axis=0) for mask in masks]))
        planned.append(1 - np.array([skip_probabilities(lds, n, stage.num_steps, 12) for n in steps], float))
    quarter = [each[:50] for each in (*ran, *planned)]
    of_all = "of all layers {:.3f}, {:.3f} and {:.3f} ran, planned {:.3f}, {:.3f} and {:.3f}; in the first quarter of the stage {:.3f}, {:.3f} and {:.3f} ({:.3f}, {:.3f}, {:.3f})"
    of_some = "of the first layer {:.2f}, {:.2f} and {:.2f}, of the last {:.2f}, {:.2f} and {:.2f}"
    text = (STUDY / "layers.md").read_text().replace("\n", " ")
    assert of_all.format(*(each.mean() for each in (*ran, *planned, *quarter))) in text
    assert of_some.format(*(each[:, layer].mean() for layer in (0, -1) for each in ran)) in text
    errors = [np.sqrt((p * (1 - p)).sum(0)) / len(p) for p in planned]
    furthest = max((abs(r.mean(0) - p.mean(0)) / error).max() for r, p, error in zip(ran, planned, errors, strict=True))
    assert f"further from its plan than {furthest:.1f} standard errors" in text


def test_equal_flops_are_equal() -> None:
    flops = {name: planned_flops(run) for name, (_, run) in resolved(STUDY / "sweeps" / "equal_flops.yaml").items()}
    dense = flops["dense-seed=1"]
    assert all(each == pytest.approx(dense, rel=0.01) for each in flops.values()), flops


def test_no_run_is_trained_twice() -> None:
    """What two sweeps need is in one of them, as the other says."""
    names = [
        (run.config.model_dump_json(), f"{path.stem}/{name}")
        for path in SWEEPS
        for name, (_, run) in resolved(path).items()
    ]
    found: dict[str, list[str]] = {}
    for config, name in names:
        found.setdefault(config, []).append(name)
    assert [alike for alike in found.values() if len(alike) > 1] == []


@pytest.mark.parametrize(("kind", "factor"), [("twice", 2), ("lost", 0)])
def test_planted_residuals(kind: str, factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SkippableTransformerLayer, "forward", SkippableTransformerLayer.forward)  # is put back
    load_script(STUDY / "wrong_residual.py").plant(kind)
    gate, hidden = SkipGate(), torch.ones(2, 1, 4)
    gate.set(SkipMask(0, 0, ((True,),)))
    output, _ = SkippableTransformerLayer.forward(SimpleNamespace(gate=gate, layer=0), hidden)
    assert torch.equal(output, factor * hidden)


def test_a_lost_residual_shows_in_the_loss(tmp_path: Path) -> None:
    """In steps that skip any layer nothing reaches the head, layers having no biases; others are as ever."""
    script = STUDY / "wrong_residual.py"
    warm.run([sys.executable, str(script), "lost", "--run-dir", str(tmp_path / "run"), *TINY], check=True, timeout=240)
    lines = read_run(tmp_path / "run").steps["finetune"]
    knows_nothing = [line["loss"] == pytest.approx(math.log(1024), abs=1e-5) for line in lines]
    assert knows_nothing == [line["layers_skipped"] > 0 for line in lines] and 0 < sum(knows_nothing) < len(lines)


def test_the_recipes_are_the_cases_of_their_sweep() -> None:
    """And the quickstart is the fast one."""
    cases = {name: run.config for name, (_, run) in resolved(STUDY / "sweeps" / "recipes.yaml").items()}
    for name in ("fast", "paper"):
        assert resolve(load(STUDY.parent / "recipes" / name)).config == cases[f"{name}-seed=1234"]
    assert resolve(load(STUDY.parent / "quickstart")).config == cases["fast-seed=1234"]
