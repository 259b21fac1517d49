"""What the study says of the paper's claims is what the runs came to."""

from __future__ import annotations

import re
from statistics import fmean

import pytest

from megatron_sts.report.groups import half_width
from tests.examples.study_results import PAGES, TEXT, accuracies, by_seed, rows_of, shares_of

CASES = ("lds", "vtc-uniform", "vtc-random", "vtc-guided", "sts-uniform", "sts-random", "sts-guided")
"""Of the MiniGPT-4 type."""


def test_claims() -> None:
    """What its text says of a sampler, and of its own intervals, is what the table's sources have."""
    found = {row["runs"]: row for row in rows_of("claims_llava.overview")}
    [row] = [line for line in PAGES.splitlines() if "| 96.9 to 99.7 %" in line]
    shown = re.findall(r"`(\w+)` \(([\d.]+) %", row)
    assert {name for name, _ in shown} == {"uniform", "guided", "anchored", "random"}
    for name, share in shown:
        assert float(share) == pytest.approx(100 * float(found[f"sts-{name}"]["mean.of_first"]), abs=0.05 + 1e-9)
    [share] = re.findall(r"FLOPs saved \| (\d+) %", PAGES)
    saved = [1 - float(row["flops_executed"]) / float(row["flops_dense"]) for name, row in found.items() if "sts" in name]  # fmt: skip
    assert all(float(share) == pytest.approx(100 * each, abs=0.5) for each in saved)
    text = re.findall(r"(?:loss \(|keeps )(\d\.\d+) (?:of the dense accuracy, 95 % interval |\()(\d\.\d+) to (\d\.\d+)", PAGES)  # fmt: skip
    found |= {row["runs"].rpartition("/")[2]: row for row in rows_of("reading.overview")}
    for numbers, name in zip(text, ("vtc-anchored", "sts-anchored", "sampler=anchored-keep_ratio=0.5"), strict=True):
        for number, part in zip(numbers, ("", ".low", ".high"), strict=True):
            assert float(number) == pytest.approx(float(found[name][f"mean.of_first{part}"]), abs=5.5e-4)


def test_minigpt4() -> None:
    """What its text says of single runs, losses, and the paper's range."""
    sweep = "claims_minigpt4"
    kept = {case: shares_of(f"{sweep}/{case}", f"{sweep}/dense") for case in CASES}
    for name in ("guided", "random", "uniform"):
        assert "({:.3f}, {:.3f}, {:.3f}".format(*kept[f"vtc-{name}"]) in TEXT.replace("(by seed ", "(")
    assert all(uniform < min(others) for uniform, *others in zip(*(kept[f"vtc-{name}"] for name in ("uniform", "guided", "random")), strict=True))  # fmt: skip
    below = [case for case in CASES if 1 - fmean(kept[case]) > half_width(kept[case])]
    assert below == ["vtc-guided", "sts-guided"]
    relations = {name: accuracies(f"{sweep}/vtc-{name}", "relation") for name in ("uniform", "guided")}
    assert all(relations["guided"][seed] > of for seed, of in relations["uniform"].items())
    worst = min(shares_of(f"{sweep}/vtc-uniform", f"{sweep}/dense", "relation"))
    assert 0.2 < 1 - worst < 0.25 and "in its worst seed, more than a fifth of relations" in TEXT
    assert max(shares_of(f"{sweep}/lds", f"{sweep}/dense", "ocr")) < 1
    cases = ("vtc-uniform", "vtc-random", "vtc-guided", "dense")
    ends = [by_seed(f"{sweep}/{case}", "alignment.last_loss").values() for case in cases]
    words = "{:.2f} to {:.2f} with `uniform`, {:.2f} to {:.2f} with `random`, {:.2f} to {:.2f} with `guided`, {:.2f} to {:.2f} dense."
    assert words.format(*(each(of) for of in ends for each in (min, max))) in TEXT
    paper = (0.969, 0.997)
    within = {case: paper[0] <= fmean(kept[case]) <= paper[1] for case in CASES if case.startswith("sts")}
    assert within == {"sts-uniform": False, "sts-random": True, "sts-guided": True}
    for case in within:
        low, high = (fmean(kept[case]) + sign * half_width(kept[case]) for sign in (-1, 1))
        assert low < paper[0] and high > paper[1]  # no interval excludes either end


def test_two_types() -> None:
    """FLOPs and means of the MiniGPT-4 type, beside the LLaVA type's."""
    text, saved, means, absolute = TEXT, [], [], []
    for sweep in ("claims_minigpt4", "claims_llava"):
        found = {row["runs"]: row for row in rows_of(f"{sweep}.overview")}  # fmt: skip
        flops = {case: float(row["flops_executed"]) / float(found["dense"]["flops_executed"]) for case, row in found.items()}  # fmt: skip
        alignment = [by_seed(f"{sweep}/{case}", "alignment.flops_executed")["2"] for case in ("vtc-uniform", "dense")]
        saved.append([100 * (1 - flops["vtc-uniform"]), 100 * (1 - flops["lds"]), 100 * (1 - alignment[0] / alignment[1]), 100 * (1 - flops["sts-uniform"])])  # fmt: skip
        means.append([fmean(shares_of(f"{sweep}/vtc-{name}", f"{sweep}/dense")) for name in ("guided", "random", "uniform")])  # fmt: skip
        absolute.append(float(found["dense"]["mean"]))
    ours, llava = saved
    assert f"{ours[0]:.0f} % of the FLOPs instead of {llava[0]:.0f}, though" in text
    assert f"{ours[2]:.0f} % of alignment's FLOPs instead of {llava[2]:.0f}." in text
    assert f"both together save {ours[3]:.1f} %" in text
    assert f"VTC in alignment saved {ours[0]:.0f} % of the FLOPs, LDS {ours[1]:.0f} %. LDS kept" in text
    assert f"and saved {ours[1]:.0f} %, not told apart" in text
    assert "the LLaVA type the three kept {:.3f}, {:.3f} and {:.3f}: there".format(*means[1]) in text
    assert "VTC {:.3f} (`guided`), {:.3f} (`random`), {:.3f} (`uniform`), which".format(*means[0]) in text
    both = [
        fmean(shares_of(f"claims_minigpt4/sts-{name}", "claims_minigpt4/dense"))
        for name in ("guided", "random", "uniform")
    ]
    assert f"both together {min(both):.2f} to {max(both):.2f}." in text.replace("   (", " (")
    assert "answers {:.3f} of the questions (LLaVA type {:.3f})".format(*absolute) in text
    assert f"reading {fmean(accuracies('claims_minigpt4/dense', 'ocr').values()):.3f}: a weaker" in text
