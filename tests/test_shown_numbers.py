"""What README.md and tools/README.md show is what was measured: the quickstart's committed comparison, and the GPU's committed report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FIRST_PAGE = (ROOT / "README.md").read_text()
TOOLS = (ROOT / "tools/README.md").read_text()
SHOWN_DIGITS = 0.005 + 1e-9
"""Two digits behind the point, rounded up or down."""


def rows(text: str, start: str) -> list[list[str]]:
    """The cells of a table's rows that begin so."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith(start)
    ]


def measured(kernels: str, stage: str, case: str) -> list[str]:
    """A row of the report's first table, which is of the layers as they are now."""
    report = (ROOT / "tests/gpu/reports/nvidia-h200.md").read_text()
    return next(row for row in rows(report, f"| {kernels} | {stage} |") if row[3] == case)


def number_of(cell: str) -> float:
    return float(cell.removesuffix(" ms"))


def test_quickstart() -> None:
    ratios = json.loads((ROOT / "examples/quickstart/expected/comparison.json").read_text())["ratios"]
    [(_, flops, seconds, _)] = rows(FIRST_PAGE, "| quickstart")
    assert float(flops) == pytest.approx(ratios["flops"], abs=SHOWN_DIGITS)
    assert float(seconds.split()[0]) == pytest.approx(ratios["wall"], abs=SHOWN_DIGITS)
    text = (ROOT / "examples/quickstart/README.md").read_text()
    for shown in (*re.findall(r"kept ([\d.]+) of the\s+dense accuracy", FIRST_PAGE), *re.findall(r"kept ([\d.]+) of", text)):  # fmt: skip
        assert float(shown) == pytest.approx(ratios["accuracy_mean"], abs=half_of_the_last_digit(shown))


def half_of_the_last_digit(shown: str) -> float:
    return 0.5 * 10.0 ** -len(shown.partition(".")[2]) + 1e-9


def test_quickstart_by_family() -> None:
    """ "relations 0.94 → 0.91": dense, STS."""
    runs = json.loads((ROOT / "examples/quickstart/expected/comparison.json").read_text())["runs"]
    text = (ROOT / "examples/quickstart/README.md").read_text()
    shown = re.findall(r"(existence|relations|counting|reading numbers|multiple choice) ([\d.]+) → ([\d.]+)", text)
    families = ("existence", "relation", "counting", "ocr", "choice")
    assert len(shown) == len(families)
    for (_, *numbers), family in zip(shown, families, strict=True):
        for number, run in zip(numbers, ("dense", "sts"), strict=True):
            assert float(number) == pytest.approx(runs[run]["accuracy"][family], abs=SHOWN_DIGITS)


@pytest.mark.parametrize(
    ("start", "stage", "case"),
    [
        ("| a step of LLaVA-1.5-7B", "alignment", "VTC"),
        ("| a step of fine-tuning 8", "finetune", "LDS 50%"),
        ("| the same, a quarter", "finetune", "LDS 25%"),
    ],
)
def test_one_gpu_on_the_first_page(start: str, stage: str, case: str) -> None:
    [(_, flops, seconds, _)] = rows(FIRST_PAGE, start)
    found = measured("te", stage, case)
    assert [float(seconds), float(flops)] == pytest.approx([float(found[6]), float(found[7])], abs=SHOWN_DIGITS)


def test_one_gpu() -> None:
    cases = {"dense": "dense", "VTC": "VTC", "1/4": "LDS 25%", "1/2": "LDS 50%", "3/4": "LDS 75%"}
    shown = rows(TOOLS, "| alignment |") + rows(TOOLS, "| finetune |")
    assert len(shown) == 6
    for stage, what, *numbers in shown:
        case = next(name for word, name in cases.items() if word in what)
        bf16, fp8 = measured("te", stage, case), measured("tensorwise", stage, case)
        found = [bf16[7], bf16[5], bf16[6], fp8[5], fp8[6]]
        assert [number_of(cell) for cell in numbers] == [number_of(cell) for cell in found]


def test_interleaved_ranks() -> None:
    [row] = rows(TOOLS, "| 3 | 8 |")
    [(paper, ours)] = re.findall(r"([\d.]+) of the saved FLOPs arrived as\s+time with the paper's sampler, ([\d.]+) with", FIRST_PAGE)  # fmt: skip
    assert (ours, paper) == (row[3], row[7].split(" / ")[0])
