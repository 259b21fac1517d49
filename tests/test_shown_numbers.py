"""What README.md and tools/README.md show is what was measured: the quickstart's committed comparison, and the GPU's committed report."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from statistics import fmean

import pytest

from megatron_sts.report.groups import half_width

ROOT = Path(__file__).parent.parent
FIRST_PAGE = (ROOT / "README.md").read_text()
STUDY = "".join(page.read_text() for page in sorted((ROOT / "examples/study").glob("*.md")))
LDS = (ROOT / "megatron_sts/lds/README.md").read_text()
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


def test_recipes() -> None:
    """The study's first seed is the quickstart; what pages say of its three seeds is what the runs came to."""
    raw = list(csv.DictReader((ROOT / "examples/study/results/recipes.csv").open()))
    by_case = {case: {row["seed"]: row for row in raw if row["case"] == case} for case in ("dense", "paper", "fast")}
    kept = json.loads((ROOT / "examples/quickstart/expected/comparison.json").read_text())["runs"]
    for case, run in (("dense", "dense"), ("fast", "sts")):
        for family, accuracy in kept[run]["accuracy"].items():
            assert float(by_case[case]["1234"][f"eval.{family}"]) == pytest.approx(accuracy, abs=1e-5)
    times = {seed: wall(by_case["dense"][seed]) / wall(row) for seed, row in by_case["fast"].items()}
    shown = re.findall(r"times as fast, by seed: (\d\.\d+), (\d\.\d+), (\d\.\d+)", STUDY)
    assert [float(each) for each in shown[0]] == pytest.approx([times[seed] for seed in ("1234", "2", "3")], abs=SHOWN_DIGITS)  # fmt: skip
    kept = {seed: float(row["eval.mean"]) / float(by_case["dense"][seed]["eval.mean"]) for seed, row in by_case["fast"].items()}  # fmt: skip
    shares = tuple(f"{kept[seed]:.3f}" for seed in ("1234", "2", "3"))
    for text in (FIRST_PAGE, (ROOT / "examples/quickstart/README.md").read_text()):
        assert re.findall(r"kept\s+(\d\.\d+),\s+(\d\.\d+)\s+and\s+(\d\.\d+)", text) == [shares]
        [span] = re.findall(r"(\d\.\d+)\s+to\s+(\d\.\d+)\s+of\s+the\s+time", text)
        found = [1 / max(times.values()), 1 / min(times.values())]
        assert [float(each) for each in span] == pytest.approx(found, abs=SHOWN_DIGITS)


def wall(run: dict[str, str]) -> float:
    """Seconds of training, of both stages."""
    return sum(float(run[f"{stage}.wall_s"]) for stage in ("alignment", "finetune"))


@pytest.mark.parametrize(
    ("start", "stage", "case"),
    [
        ("| LLaVA-1.5-7B", "alignment", "VTC"),
        ("| 8 of its layers", "finetune", "LDS 50%"),
        ("| the same, LDS", "finetune", "LDS 25%"),
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


def test_the_studys_claims() -> None:
    """What its text says of a sampler, and of its own intervals, is what the table's sources have."""
    kept = csv.DictReader((ROOT / "examples/study/results/claims_llava.overview.csv").open())
    found = {row["runs"]: row for row in kept}
    [row] = rows(STUDY, "| 96.9 to 99.7 %")
    shown = re.findall(r"`(\w+)` \(([\d.]+) %", row[1])
    assert {name for name, _ in shown} == {"uniform", "guided", "anchored", "random"}
    for name, share in shown:
        assert float(share) == pytest.approx(100 * float(found[f"sts-{name}"]["mean.of_first"]), abs=0.05 + 1e-9)
    [share] = re.findall(r"FLOPs saved \| (\d+) %", STUDY)
    saved = [1 - float(row["flops_executed"]) / float(row["flops_dense"]) for name, row in found.items() if "sts" in name]  # fmt: skip
    assert all(float(share) == pytest.approx(100 * each, abs=0.5) for each in saved)
    text = re.findall(r"(?:loss \(|keeps )(\d\.\d+) (?:of the dense accuracy, 95 % interval |\()(\d\.\d+) to (\d\.\d+)", STUDY)  # fmt: skip
    reading = csv.DictReader((ROOT / "examples/study/results/reading.overview.csv").open())
    found |= {row["runs"].rpartition("/")[2]: row for row in reading}
    for numbers, name in zip(text, ("vtc-anchored", "sts-anchored", "sampler=anchored-keep_ratio=0.5"), strict=True):
        for number, part in zip(numbers, ("", ".low", ".high"), strict=True):
            assert float(number) == pytest.approx(float(found[name][f"mean.of_first{part}"]), abs=5.5e-4)


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("claims_llava", r"of the (\d+) that are, (\d+) are so by Student's t over seeds too\. \("),
        ("reading", r"Of the (\d+) bold cells (\d+) are so by Student's t over seeds too"),
        ("claims_minigpt4", r"of the (\d+) that are, (\d+) are so by Student's t over seeds too \(paired"),
    ],
)
def test_the_studys_bold_cells(sweep: str, words: str) -> None:
    """How many families' bootstrap intervals leave 1 out, and of these, how many Student's t over the seeds does too."""
    results = ROOT / "examples/study/results"
    kept = list(csv.DictReader((results / f"{sweep}.overview.csv").open()))[1:]
    raw = [
        row
        for name in {BASES.get(sweep, "claims_llava"), sweep}
        for row in csv.DictReader((results / f"{name}.csv").open())
    ]
    by_run, bold, by_t = {row["run"]: row for row in raw}, 0, 0
    for row in kept:
        case = row["runs"].rpartition("/")[2]
        for family in ("existence", "relation", "counting", "ocr", "choice", "paired"):
            low, high = (float(row[f"{family}.of_first.{end}"]) for end in ("low", "high"))
            if low <= 1 <= high:
                continue
            bold += 1
            shares = [
                float(by_run[f"{case}-seed={seed}"][f"eval.{family}"])
                / float(by_run[f"dense-seed={seed}"][f"eval.{family}"])
                for seed in (1, 2, 3)
            ]
            by_t += abs(fmean(shares) - 1) > half_width(shares)
    [told] = re.findall(words, STUDY)
    assert (bold, by_t) == (int(told[0]), int(told[1]))


SHARES = [
    ("positions/keep_ratio=0.5", "reading/sampler=uniform-keep_ratio=0.5", "relation", "relations (by {:.2f} ± {:.2f})"),
    ("positions/keep_ratio=0.5", "reading/sampler=uniform-keep_ratio=0.5", "counting", "and counting ({:.2f} ± {:.2f}); the"),
    ("positions/keep_ratio=0.5", "reading/sampler=uniform-keep_ratio=0.5", "mean", "the mean ({:.2f} ± {:.2f}) does not"),
    ("alignment_lds/in-alignment", None, "mean", "alone, LDS in alignment kept {:.3f} ± {:.3f} of"),
    ("alignment_lds/in-both", "claims_llava/lds", "mean", "it took {:.3f} ± {:.3f} more than `lds`"),
    ("learning_rates/dense-5e-4", None, "mean", "at 5e-4 it came to {:.3f} ± {:.3f} of"),
    ("learning_rates/dense-3.5e-4", None, "mean", "at 3.5e-4 to {:.3f} ± {:.3f};"),
    ("recipes/fast", "learning_rates/fast-5e-4", "mean", "in each seed, by {:.3f} ± {:.3f}"),
    ("masks/rounds-of-4", "schedules/paper", "mean", "and of 4 layers {:.3f} ± {:.3f}, `balanced`"),
    ("masks/rounds-of-2", "schedules/paper", "mean", "`rounds` of 2 layers {:.3f} ± {:.3f} and of 4"),
    ("masks/bernoulli-microbatch", "schedules/paper", "mean", "a mask a micro-batch lost {:.3f} ± {:.3f} of the dense"),
    ("masks/balanced-microbatch", "schedules/paper", "counting", "counting ({:.3f} ± {:.3f} with a mask a micro-batch"),
    ("masks/balanced-step", "schedules/paper", "counting", "{:.3f} ± {:.3f} with one a step"),
    ("masks/balanced-step", "schedules/paper", "mean", "`balanced` {:.3f} ± {:.3f} with a mask a step and"),
    ("masks/balanced-microbatch", "schedules/paper", "mean", "{:.3f} ± {:.3f} with one a micro-batch; a whole point"),
    ("masks/rounds-of-4", "schedules/paper", "mean", "`rounds` of 4 layers lost {:.3f} ± {:.3f} of the dense accuracy"),
    ("masks/rounds-of-2", "schedules/paper", "mean", "accuracy, of 2 layers {:.3f} ± {:.3f} ("),
    ("updates/zero_grad", "schedules/paper", "ocr", "reading with `zero_grad` ({:.3f} ± {:.3f} lost)"),
    ("less_lds/less-lds", None, "counting", "Counting is at {:.3f} ± {:.3f} in the mean"),
    ("updates/zero_grad", "schedules/paper", "mean", "`zero_grad` lost {:.3f} ± {:.3f} of the dense accuracy"),
    ("schedules/paper", "updates/inverse_keep", "mean", "`inverse_keep` gained {:.3f} ± {:.3f}. Of 21"),
    ("updates/zero_grad-inverse_keep", "schedules/paper", "mean", "both together {:.3f} ± {:.3f};"),
    ("less_lds/less-lds", None, "mean", "it kept {:.3f} ± {:.3f} of the dense accuracy (by seed"),
    ("alignment_lds/in-both", "claims_llava/lds", "relation", "had lost as much but for {:.3f}"),
    ("claims_llava/lds", None, "relation", "(`lds`, {:.3f} ± {:.3f})"),
    ("claims_minigpt4/vtc-guided", None, "mean", "`guided` kept {:.3f} ± {:.3f} (by seed"),
    ("claims_minigpt4/vtc-random", None, "mean", "`random` {:.3f} ± {:.3f} (0.992"),
    ("claims_minigpt4/vtc-uniform", None, "mean", "`uniform` {:.3f} ± {:.3f} (0.984"),
    ("claims_minigpt4/lds", None, "mean", "alone kept {:.3f} ± {:.3f} and saved 9 %"),
    ("claims_minigpt4/lds", None, "ocr", "reading was lower in all seeds ({:.3f} ± {:.3f})"),
    ("claims_minigpt4/sts-uniform", "claims_minigpt4/vtc-uniform", "mean", "took a further {:.3f} ± {:.3f} (`uniform`)"),
    ("claims_minigpt4/sts-guided", "claims_minigpt4/vtc-guided", "mean", "{:.3f} ± {:.3f} (`guided`), 0.032"),
    ("claims_minigpt4/sts-random", "claims_minigpt4/vtc-random", "mean", "{:.3f} ± {:.3f} (`random`). - Against"),
    ("claims_minigpt4/sts-guided", None, "mean", "and keep {:.3f} ± {:.3f} (`guided`)"),
    ("claims_minigpt4/sts-random", None, "mean", "{:.3f} ± {:.3f} (`random`), 0.858"),
    ("claims_minigpt4/sts-uniform", None, "mean", "{:.3f} ± {:.3f} (`uniform`): **96.9 %"),
    ("claims_minigpt4/vtc-uniform", "claims_minigpt4/dense", "ocr", "lose {:.2f} ± {:.2f} and 0.24"),
    ("claims_minigpt4/vtc-uniform", "claims_minigpt4/dense", "counting", "and {:.2f} ± {:.2f} by VTC alone; relations"),
    ("claims_minigpt4/vtc-uniform", "claims_minigpt4/vtc-guided", "relation", "in all seeds, by {:.2f} ± {:.2f}. Nothing"),
    ("alignment_lds/in-both", None, "relation", "relations of `in-both` ({:.3f} ± {:.3f})"),
]  # fmt: skip
"""A case, the one that is better, in what, and how the study says by how much; without a better one what the case keeps."""
CASES = ("lds", "vtc-uniform", "vtc-random", "vtc-guided", "sts-uniform", "sts-random", "sts-guided")
"""Of the MiniGPT-4 type."""
BASES = {
    "recipes": "recipes",
    "learning_rates": "recipes",
    "less_lds": "less_lds",
    "claims_minigpt4": "claims_minigpt4",
    **dict.fromkeys(("schedules", "masks", "updates"), "equal_flops"),
}
"""By sweep where its dense runs are, if not in claims_llava."""


@pytest.mark.parametrize(("case", "better", "of", "words"), SHARES)
def test_the_studys_intervals(case: str, better: str | None, of: str, words: str) -> None:
    """Of shares of the dense accuracy, seed by seed, with their 95 % interval by Student's t."""
    ours = accuracies(case, of)
    dense = accuracies(f"{BASES.get(case.partition('/')[0], 'claims_llava')}/dense", of)
    assert len(ours) == len(dense)
    found = [ours[seed] / dense[seed] for seed in ours]
    if better is not None:
        theirs = accuracies(better, of)
        found = [(theirs[seed] - ours[seed]) / dense[seed] for seed in ours]
    assert words.format(fmean(found), half_width(found)) in (STUDY + LDS).replace("\n", " ")


@pytest.mark.parametrize(
    ("case", "column", "words"),
    [
        ("alignment_lds/in-both", "alignment.last_loss", "the loss of captions was {:.2f}, {:.2f} and {:.2f} by seed"),
        ("updates/inverse_keep", "finetune.first_loss", "({:.2f}, {:.2f} and {:.2f} in the first 20 steps; `paper`"),
        ("schedules/paper", "finetune.first_loss", "`paper` {:.2f}, {:.2f} and {:.2f})"),
        ("claims_llava/dense", "alignment.last_loss", "by seed, dense {:.2f}, {:.2f} and {:.2f}"),
    ],
)
def test_the_studys_losses_by_seed(case: str, column: str, words: str) -> None:
    assert words.format(*by_seed(case, column).values()) in STUDY.replace("\n", " ")


def test_the_studys_inverse_keep() -> None:
    """Its validation loss beside that of ``paper``, seed by seed."""
    paper, ours = (by_seed(case, "finetune.validation_loss") for case in ("schedules/paper", "updates/inverse_keep"))
    lower = [paper[seed] - ours[seed] for seed in paper]
    assert min(lower) > 0
    assert f"in each seed, by {fmean(lower):.4f} ± {half_width(lower):.4f}, which" in STUDY.replace("\n", " ")


def test_the_studys_pairs() -> None:
    """Where its text says that all runs of some cases are worse, and what single seeds came to."""
    pairs = [
        ("alignment_lds/in-alignment", "claims_llava/dense"),
        ("alignment_lds/in-both", "claims_llava/lds"),
        ("recipes/fast", "learning_rates/fast-5e-4"),
        *((f"positions/keep_ratio={kept}", f"reading/sampler=uniform-keep_ratio={kept}") for kept in (0.5, 0.25)),
    ]
    for worse, better in pairs:
        ours, theirs = accuracies(worse, "mean"), accuracies(better, "mean")
        assert len(ours) == 3 and all(ours[seed] < theirs[seed] for seed in ours)
    for case, base, words in (
        ("positions/keep_ratio=0.5", "claims_llava", "(by seed {:.3f}, {:.3f}, {:.3f}) instead of 0.870"),
        ("less_lds/less-lds", "less_lds", "(by seed {:.3f}, {:.3f}, {:.3f}, {:.3f}); on the three"),
        ("learning_rates/fast-5e-4", "recipes", "(by seed {:.3f}, {:.3f}, {:.3f}), higher than at 8e-4 in each seed"),
    ):
        ours, dense = accuracies(case, "mean"), accuracies(f"{base}/dense", "mean")
        assert words.format(*(ours[seed] / dense[seed] for seed in ours)) in STUDY
    fast_mean, dense_mean = (
        fmean(accuracies(f"learning_rates/{case}-5e-4", "mean").values()) for case in ("fast", "dense")
    )
    assert f"of dense at 5e-4 that is {fast_mean / dense_mean:.3f}" in STUDY


def test_the_studys_minigpt4() -> None:
    """What its text says of single runs, losses and FLOPs."""
    text, sweep = STUDY.replace("\n", " "), "claims_minigpt4"
    dense = accuracies(f"{sweep}/dense", "mean")
    kept = {case: [accuracies(f"{sweep}/{case}", "mean")[seed] / dense[seed] for seed in dense] for case in CASES}
    for name in ("guided", "random", "uniform"):
        assert "({:.3f}, {:.3f}, {:.3f}".format(*kept[f"vtc-{name}"]) in text.replace("(by seed ", "(")
    assert all(round(kept[case][0], 3) >= round(max(kept[case]), 3) for case in CASES[1:])  # seed 1
    firsts = by_seed(f"{sweep}/dense", "alignment.first_loss").values()
    assert "(first loss {:.2f}, the others {:.2f} and {:.2f})".format(*firsts) in text
    worst = [accuracies(f"{sweep}/vtc-uniform", of)["3"] / accuracies(f"{sweep}/dense", of)["3"] for of in ("relation", "counting")]  # fmt: skip
    assert "({:.2f} and {:.2f} left in `uniform`'s worst seed)".format(*worst) in text
    assert kept["vtc-uniform"][2] == min(kept["vtc-uniform"])
    with_vtc = sorted(
        (share, loss)
        for case in CASES[1:4]
        for share, loss in zip(kept[case], by_seed(f"{sweep}/{case}", "alignment.last_loss").values(), strict=True)
    )
    losses = sorted(loss for _, loss in with_vtc[:3])
    assert f"a loss of captions of {losses[0]:.1f} to {losses[-1]:.1f} at the end" in text
    others = sorted((loss, share) for share, loss in with_vtc[3:] if loss > 1.5)
    assert "two of {:.2f} and {:.2f} kept {:.3f} and {:.3f}: it".format(*(each for pair in zip(*others, strict=True) for each in pair)) in text  # fmt: skip
    ends = [by_seed(f"{name}/dense", "alignment.last_loss").values() for name in (sweep, "claims_llava")]
    assert "(loss of captions {:.2f} to {:.2f} dense, in the LLaVA type {:.2f} to {:.2f})".format(*(each(of) for of in ends for each in (min, max))) in text  # fmt: skip


def test_the_studys_two_types() -> None:
    """FLOPs and means of the MiniGPT-4 type, beside the LLaVA type's."""
    text, saved, means, absolute = STUDY.replace("\n", " "), [], [], []
    for sweep in ("claims_minigpt4", "claims_llava"):
        found = {row["runs"]: row for row in csv.DictReader((ROOT / f"examples/study/results/{sweep}.overview.csv").open())}  # fmt: skip
        flops = {case: float(row["flops_executed"]) / float(found["dense"]["flops_executed"]) for case, row in found.items()}  # fmt: skip
        alignment = [by_seed(f"{sweep}/{case}", "alignment.flops_executed")["1"] for case in ("vtc-uniform", "dense")]
        saved.append([100 * (1 - flops["vtc-uniform"]), 100 * (1 - flops["lds"]), 100 * (1 - alignment[0] / alignment[1]), 100 * (1 - flops["sts-uniform"])])  # fmt: skip
        means.append([fmean(float(each) for each in shares_of(sweep, f"vtc-{name}")) for name in ("guided", "random", "uniform")])  # fmt: skip
        absolute.append(float(found["dense"]["mean"]))
    ours, llava = saved
    assert f"{ours[0]:.0f} % of the FLOPs instead of {llava[0]:.0f}." in text
    assert f"{ours[2]:.0f} % of alignment's FLOPs instead of {llava[2]:.0f}." in text
    assert f"both together save {ours[3]:.1f} %" in text
    assert f"VTC in alignment saved {ours[0]:.0f} % of the FLOPs, LDS {ours[1]:.0f} %. LDS kept" in text
    assert f"and saved {ours[1]:.0f} %, not told apart" in text
    assert "the LLaVA type {:.3f}, {:.3f} and {:.3f}. No mean".format(*means[1]) in text
    assert "VTC {:.3f} (`guided`), {:.3f} (`random`), {:.3f} (`uniform`), which".format(*means[0]) in text
    both = [fmean(shares_of("claims_minigpt4", f"sts-{name}")) for name in ("guided", "random", "uniform")]
    assert f"both together {min(both):.2f} to {max(both):.2f} (" in text.replace("   (", " (")
    assert "answers {:.3f} of the questions (LLaVA type {:.3f})".format(*absolute) in text
    assert f"reading {fmean(accuracies('claims_minigpt4/dense', 'ocr').values()):.3f}: a weaker" in text


def test_the_studys_smollm2() -> None:
    text = STUDY.replace("\n", " ")
    raw = csv.DictReader((ROOT / "examples/study/results/smollm2.csv").open())
    runs = {row["run"]: row for row in raw}
    dense, fast = runs["dense"], runs["fast"]
    stages = [float(dense[f"{stage}.wall_s"]) / float(fast[f"{stage}.wall_s"]) for stage in ("alignment", "finetune")]
    assert "{:.2f} times, {:.2f} in alignment and {:.2f} in fine-tuning".format(wall(dense) / wall(fast), *stages) in text  # fmt: skip
    [median] = re.findall(r"had all of these taken their median, ([\d.]+) s", text)
    steady = wall(dense) - float(dense["alignment.wall_s"]) + 200 * float(median)
    assert f"{median} s, it would be {steady / wall(fast):.2f} (" in text
    mean = float(fast["eval.mean"]) / float(dense["eval.mean"])
    assert f"{mean:.3f} of dense's." in text and f"kept {mean:.3f} of the accuracy in a training" in text
    found = [float(row[f"eval.{of}"]) for row in (fast, dense) for of in ("existence", "choice")]
    words = "Existence ({:.3f}) and choice ({:.3f}) are at what guessing gives, where dense has begun to answer ({:.3f} and {:.3f})"
    assert words.format(*found) in text
    assert f"reading is at {float(fast['eval.ocr']) / float(dense['eval.ocr']):.3f}." in text
    losses = [float(row[f"{stage}.last_loss"]) for stage in ("alignment", "finetune") for row in (fast, dense)]
    assert "was {:.2f} instead of {:.2f}, at that of fine-tuning {:.2f} instead of {:.2f}.".format(*losses) in text


def shares_of(sweep: str, case: str) -> list[float]:
    """Of the dense accuracy in the mean, by seed."""
    dense = accuracies(f"{sweep}/dense", "mean")
    return [share / dense[seed] for seed, share in accuracies(f"{sweep}/{case}", "mean").items()]


def test_the_studys_less_lds() -> None:
    raw = list(csv.DictReader((ROOT / "examples/study/results/less_lds.csv").open()))
    dense, less = ({row["seed"]: row for row in raw if row["case"] == case} for case in ("dense", "less-lds"))
    walls = {seed: (wall(dense[seed]), wall(less[seed])) for seed in dense}
    times = [
        fmean(a for a, _ in walls.values()) / fmean(b for _, b in walls.values()),
        *(a / b for a, b in walls.values()),
    ]
    assert "was {:.2f} times as fast as dense (by seed {:.2f}, {:.2f}, {:.2f}, {:.2f})".format(*times) in STUDY
    first = cases_of_recipes("dense"), cases_of_recipes("fast")
    longer = [fmean(wall(row) for row in now.values()) / fmean(map(wall, then)) for now, then in zip((dense, less), first, strict=True)]  # fmt: skip
    assert "dense runs took {:.0f} % longer than then, these {:.0f} % longer".format(*(100 * (each - 1) for each in longer)) in STUDY  # fmt: skip
    counting = {seed: float(less[seed]["eval.counting"]) / float(dense[seed]["eval.counting"]) for seed in dense}
    assert f"scatters from {min(counting.values()):.2f} to {max(counting.values()):.2f} by seed" in STUDY
    ours, theirs = (accuracies(f"less_lds/{case}", "mean") for case in ("less-lds", "dense"))
    fast, base = (accuracies(f"learning_rates/{case}-5e-4", "mean") for case in ("fast", "dense"))
    lost = [fast[seed] / base[seed] - ours[seed] / theirs[seed] for seed in fast]
    assert f"that is {fmean(lost):.3f} ± {half_width(lost):.3f} less than it kept of its own" in STUDY


@pytest.mark.parametrize(
    ("sweep", "words"),
    [("masks", "of {} comparisons this one shows"), ("updates", "Of {} comparisons one shows")],
)
def test_the_studys_comparisons(sweep: str, words: str) -> None:
    """With ``paper``, of each case in each family and the mean: in how many Student's t over seeds leaves 0 out."""
    columns = ("mean", "existence", "relation", "counting", "ocr", "choice", "paired")
    raw = csv.DictReader((ROOT / f"examples/study/results/{sweep}.csv").open())
    cases, shown = sorted({row["case"] for row in raw}), 0
    for case in cases:
        for of in columns:
            ours, paper, dense = (accuracies(name, of) for name in (f"{sweep}/{case}", "schedules/paper", "equal_flops/dense"))  # fmt: skip
            lost = [(paper[seed] - ours[seed]) / dense[seed] for seed in dense]
            shown += abs(fmean(lost)) > half_width(lost)
    assert shown == 1 and words.format(len(cases) * len(columns)) in STUDY


def test_the_studys_rounds() -> None:
    """Their first losses and their last validation losses beside ``paper``'s."""
    paper = by_seed("schedules/paper", "finetune.first_loss").values()
    rounds = sorted(loss for layers in (2, 4) for loss in by_seed(f"masks/rounds-of-{layers}", "finetune.first_loss").values())  # fmt: skip
    words = "({:.1f} to {:.1f} in the first 20 steps but for one run, `paper` {:.1f} to {:.1f})"
    assert words.format(rounds[1], rounds[-1], min(paper), max(paper)) in STUDY and rounds[0] < max(paper)
    ours, theirs = (by_seed(case, "finetune.validation_loss") for case in ("masks/rounds-of-2", "schedules/paper"))
    assert all(ours[seed] > theirs[seed] for seed in theirs)


def cases_of_recipes(case: str) -> list[dict[str, str]]:
    raw = csv.DictReader((ROOT / "examples/study/results/recipes.csv").open())
    return [row for row in raw if row["case"] == case]


def accuracies(case: str, of: str) -> dict[str, float]:
    return by_seed(case, f"eval.{of}")


def by_seed(case: str, column: str) -> dict[str, float]:
    sweep, _, name = case.partition("/")
    raw = csv.DictReader((ROOT / f"examples/study/results/{sweep}.csv").open())
    return {row["seed"]: float(row[column]) for row in raw if row["run"] == f"{name}-seed={row['seed']}"}
