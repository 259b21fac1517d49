"""The quickstart's script from its first line to the comparison, at a size that takes seconds."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
import yaml
from PIL import Image

from megatron_sts.config.load import load
from megatron_sts.config.resolve import Resolved, ResolvedStage, resolve
from megatron_sts.cost.flops import planned_load, step_flops
from megatron_sts.data.scenes.source import evaluation_questions
from megatron_sts.lds.mask import draw_mask
from megatron_sts.lds.placement import placement
from tests import warm

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "quickstart"
SCRIPT = EXAMPLE / "run.sh"
TINY = [
    "model.vision.init=null", "model.language.init=null", "model.vision.num_layers=1", "model.language.num_layers=8",
    "parallel.data_parallel_size=1", "stages.*.steps=2", "stages.*.optimizer.warmup_steps=1",
    "stages.*.batch.global_batch_size=2", "stages.*.batch.micro_batch_size=2", "evaluation.num_questions=12",
    "logging.tensorboard=false",
]  # fmt: skip
FAMILIES = {"existence", "relation", "counting", "ocr", "choice", "paired"}


def start(folder: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Runs the script in ``folder``, with this interpreter's ``megatron-sts``."""
    environment = {**os.environ, "PATH": warm.path(), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(
        ["bash", SCRIPT, *TINY, *more], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )


def evaluations(runs: Path) -> int:
    """How often the two runs were evaluated."""
    lines = [line for name in ("dense", "sts") for line in (runs / name / "metrics.jsonl").read_text().splitlines()]
    return sum(json.loads(line).get("event") == "evaluation" for line in lines)


def answer(folder: Path) -> str:
    """What the README's ``generate`` prints in ``folder``."""
    (folder / "examples").symlink_to(ROOT / "examples")
    [line] = re.findall(r"^megatron-sts generate runs/quickstart/.*$", (ROOT / "README.md").read_text(), re.M)
    environment = {**os.environ, "PATH": warm.path(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        shlex.split(line), cwd=folder, env=environment, capture_output=True, text=True, timeout=100, check=True
    ).stdout


@pytest.mark.slow
@pytest.mark.timeout(520)
def test_quickstart_end_to_end_and_again(tmp_path: Path) -> None:
    first = start(tmp_path)
    assert first.returncode == 0, first.stderr
    assert "STS / dense" in first.stdout and "finetune: FLOPs" in first.stdout
    runs = tmp_path / "runs" / "quickstart"
    comparison = json.loads((runs / "comparison.json").read_text())
    assert set(comparison["runs"]["sts"]["accuracy"]) == FAMILIES
    dense, sts = (comparison["runs"][name]["stages"] for name in ("dense", "sts"))
    assert set(dense) == set(sts) == {"alignment", "finetune"}
    assert dense["alignment"]["flops_executed"] == dense["alignment"]["flops_dense"] == sts["alignment"]["flops_dense"]
    assert comparison["ratios"]["stages"]["alignment"]["flops"] < 0.8
    assert comparison["ratios"]["stages"]["finetune"]["flops"] < 0.5
    assert (runs / "comparison.png").exists() and (runs / "dense" / "report.html").exists()
    assert answer(tmp_path).endswith("\n")
    again = start(tmp_path)
    assert again.returncode == 0, again.stderr
    assert evaluations(runs) == 2
    assert json.loads((runs / "comparison.json").read_text()) == comparison


def test_the_picture_to_ask_about_is_a_scene_of_the_evaluation() -> None:
    question = evaluation_questions("counting", "eval", 11, 1234)[10]
    assert question.question == "how many cat ?"
    with Image.open(EXAMPLE / "scene.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), question.image())


def test_a_dry_run_of_both_ends_well(tmp_path: Path) -> None:
    """There is nothing to compare then."""
    dry = start(tmp_path, "--dry-run")
    assert (dry.returncode, dry.stderr) == (0, "") and dry.stdout.count("sound: it can start here") == 2
    assert not (tmp_path / "runs").exists()


def test_the_kept_flops_are_those_of_the_config() -> None:
    """Exactly: of the tokens that VTC keeps, and the layers that the masks of its seed leave."""
    resolved = resolve(load(EXAMPLE))
    kept = json.loads((EXAMPLE / "expected" / "comparison.json").read_text())["runs"]["sts"]["stages"]
    found = {
        stage.name: sum(flops(resolved, stage, step) for step in range(stage.num_steps)) for stage in resolved.stages
    }
    assert found == {name: costs["flops_executed"] for name, costs in kept.items()}


def flops(resolved: Resolved, stage: ResolvedStage, step: int) -> int:
    """Of one step."""
    layers, lds = float(resolved.config.model.language.num_layers), stage.config.lds
    if lds is not None:
        place = placement(resolved, stage)
        mask = draw_mask(lds, resolved.config.seed, stage.index, step, stage.num_steps, place, stage.num_microbatches)
        layers -= mask.num_skipped
    return step_flops(resolved, stage, planned_load(resolved, stage, stage.tokens(step)), layers_executed=layers)


def test_the_readme_shows_what_rounds_cost() -> None:
    """The means of the committed table, whose runs were the fine-tuning of an earlier quickstart (skipping_quality.yaml)."""
    rows = list(csv.DictReader((EXAMPLE / "expected" / "skipping_quality.csv").open()))
    readme = re.findall(
        r"^\| (`bernoulli`|`rounds` of .|the same, )[^|]*\|(.*)\|$",
        (ROOT / "megatron_sts/lds/README.md").read_text(),
        re.M,
    )
    shown = [[float(number) for number in re.findall(r"([\d.]+) ±", cells)] for _, cells in readme]
    cases = list(dict.fromkeys(row["case"] for row in rows))
    assert len(shown) == len(cases) == 5 and len(rows) == 5 * 3 * 3
    for case, means in zip(cases, shown, strict=True):
        of_families = [
            mean(float(row["accuracy"]) for row in rows if (row["case"], row["family"]) == (case, family))
            for family in ("existence", "ocr", "choice")
        ]
        assert means == pytest.approx([*of_families, mean(of_families)], abs=6e-4)  # three digits
    [stage] = yaml.safe_load((EXAMPLE / "expected" / "skipping_quality.yaml").read_text())["stages"]
    assert (stage["steps"], stage["optimizer"]["lr"], stage["lds"]) == (200, 1e-3, {"alpha": 0.5, "epsilon": 0.5})
