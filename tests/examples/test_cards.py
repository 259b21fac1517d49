"""Each example heads its README with its card; what cards say is what is kept, and what the plan says now."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_sts.cards.card import Figure, Result, Status, read_card, write_card
from megatron_sts.cards.head import readme_head
from megatron_sts.plan.hardware import load_hardware
from tools import cards as tool

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
WITHOUT = {"study"}
"""Sweeps, most of which have not been run: no one command whose results a card could tell."""
NAMES = sorted(path.name for path in EXAMPLES.iterdir() if (path / "README.md").is_file() and path.name not in WITHOUT)
CARDS = {name: read_card(EXAMPLES / name) for name in NAMES}
PLANNED = [name for name, card in CARDS.items() if card.status is Status.PLANNED]
KEPT = [result for card in CARDS.values() for evidence in card.evidence for result in evidence.results if result.source]
SAME_DIGITS = 5e-4
"""Relative: cards have four digits of what is kept."""


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_begins_with_the_card(name: str) -> None:
    assert (EXAMPLES / name / "README.md").read_text().startswith(readme_head(CARDS[name]))


@pytest.mark.parametrize("name", PLANNED)
def test_planned_cards_are_what_the_plan_says(name: str) -> None:
    """Within ``PLAN_RTOL``. Mend what fails with tools/cards.py --write."""
    card = CARDS[name]
    _, wrong = tool.renewed(card, EXAMPLES / name)
    assert not wrong
    memory_gib = load_hardware(tool.HARDWARE).device.memory_gib
    assert card.needs.memory_gib is not None and card.needs.memory_gib < memory_gib
    assert card.command == f"megatron-sts plan examples/{name} --hardware {tool.HARDWARE}"


def test_a_plan_that_moved_is_told_and_mended(tmp_path: Path) -> None:
    """By 5 %: more than the tolerance. What was measured stays."""
    for file in ("config.yaml", "README.md"):
        (tmp_path / file).write_text((EXAMPLES / "llava15_7b" / file).read_text())
    card, step = CARDS["llava15_7b"], CARDS["llava15_7b"].needs.step_s["finetune"]
    moved = {**card.needs.step_s, "finetune": Figure(value=step.value * 1.05, tolerance=step.tolerance)}
    write_card(card.model_copy(update={"needs": card.needs.model_copy(update={"step_s": moved})}), tmp_path)
    wrong = tool.check(tmp_path, write=True)
    assert wrong[0].startswith("seconds a step, finetune: ")
    assert wrong[1:] in ([], ["README.md does not begin with the card"])  # which tells another commit, on most days
    mended = read_card(tmp_path)
    assert (mended.needs, mended.evidence[1:]) == (card.needs, card.evidence[1:])
    assert (tmp_path / "README.md").read_text().startswith(readme_head(mended))
    assert tool.check(tmp_path, write=False) == []


@pytest.mark.parametrize("result", KEPT, ids=lambda result: result.source)
def test_measured_cards_are_what_was_kept(result: Result) -> None:
    assert result.source is not None
    assert kept(result.source) == pytest.approx(result.value, rel=SAME_DIGITS)


def test_results_without_a_source_are_found_again_by_a_test() -> None:
    again = {(name, result.what) for name, card in CARDS.items() for evidence in card.evidence
             for result in evidence.results if not result.source and evidence.status is not Status.PLANNED}  # fmt: skip
    texts = {name: (ROOT / "tests" / "examples" / f"test_{name}.py").read_text() for name, _ in again}
    assert all(f'result("{what}").admits(' in texts[name] for name, what in again)


@pytest.mark.parametrize("name", NAMES)
def test_commits_are_of_this_history(name: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    asked = ["git", "rev-parse", "--is-shallow-repository"]
    if subprocess.run(asked, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip() == "true":
        pytest.skip("a clone without its history")
    for evidence in CARDS[name].evidence:
        subprocess.run(["git", "merge-base", "--is-ancestor", evidence.commit, "HEAD"], cwd=ROOT, check=True)


def test_quickstart_needs_what_its_kept_runs_took() -> None:
    """Of STS; the larger peak is that of either run."""
    runs = json.loads((EXAMPLES / "quickstart" / "expected" / "comparison.json").read_text())["runs"]
    needs, num_steps = CARDS["quickstart"].needs, {"alignment": 120, "finetune": 300}
    for stage, costs in runs["sts"]["stages"].items():
        assert needs.step_s[stage].value == pytest.approx(costs["wall_s"] / num_steps[stage], rel=SAME_DIGITS)
    peak_bytes = max(costs["peak_memory_bytes"] for run in runs.values() for costs in run["stages"].values())
    assert needs.memory_gib == pytest.approx(peak_bytes / 2**30, rel=SAME_DIGITS)


def test_llava_json_needs_what_its_kept_run_took() -> None:
    found = json.loads((EXAMPLES / "llava_json" / "expected" / "run.json").read_text())
    needs = CARDS["llava_json"].needs
    assert {stage: step.value for stage, step in needs.step_s.items()} == found["seconds_a_step"]
    assert needs.memory_gib == found["peak_memory_gib"]


def test_smol_vlm_needs_what_its_readme_says() -> None:
    text, card = (EXAMPLES / "smol_vlm" / "README.md").read_text(), CARDS["smol_vlm"]
    rows = re.findall(r"^\| (\w+) \|.*\| (\d+) \| [\d.]+ \(\w+(?: keeps half)?\) \| (\d+) \|$", text, re.M)
    assert {stage: float(minutes) * 60 / int(steps) for stage, steps, minutes in rows} == pytest.approx(
        {stage: step.value for stage, step in card.needs.step_s.items()}, abs=0.01
    )
    [minutes] = re.findall(r"in (\d+) minutes from the command", text)
    assert card.needs.hours.value == pytest.approx(float(minutes) / 60, abs=0.01)


def kept(source: str) -> float:
    """The number at ``FILE#key.of.json`` or ``FILE#first cell, second, ..., column`` of a table."""
    name, _, where = source.partition("#")
    text = (ROOT / name).read_text()
    if not name.endswith(".md"):
        found: Any = json.loads(text)
        for key in where.split("."):
            found = found[key]
        return float(found)
    kernels, stage, case, column = where.split(", ")
    table = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    [heads, *_] = (row for row in table if column in row)
    [row, *_] = (
        row for row in table if row[:2] == [kernels, stage] and row[3] == case
    )  # the first is of the newer code
    return float(row[heads.index(column)].removesuffix(" ms"))
