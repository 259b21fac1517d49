"""Shares, differences and their intervals, and losses, that the study's pages say of single cases."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import fmean

import pytest

from megatron_sts.report.groups import half_width
from tests.examples.study_results import PAGES, TEXT, accuracies, by_seed, rows_of

LDS = (Path(__file__).resolve().parents[2] / "megatron_sts/lds/README.md").read_text()


SHARES = [
    ("positions/keep_ratio=0.5", "reading/sampler=uniform-keep_ratio=0.5", "relation", "relations (by {:.2f} ± {:.2f})"),
    ("positions/keep_ratio=0.5", "reading/sampler=uniform-keep_ratio=0.5", "counting", "and counting ({:.2f} ± {:.2f}); the"),
    ("positions/keep_ratio=0.5", "reading/sampler=uniform-keep_ratio=0.5", "mean", "the mean ({:.2f} ± {:.2f}) does not"),
    ("alignment_lds/in-alignment", None, "mean", "alone, LDS in alignment kept {:.3f} ± {:.3f} of"),
    ("alignment_lds/in-both", "claims_llava/lds", "mean", "it took {:.3f} ± {:.3f} more than `lds`"),
    ("learning_rates/dense-5e-4", None, "mean", "at 5e-4 it came to {:.3f} ± {:.3f} of"),
    ("learning_rates/dense-3.5e-4", None, "mean", "at 3.5e-4 to {:.3f} ± {:.3f};"),
    ("recipes/fast", None, "mean", "(by seed 0.996, 0.981, 0.981: {:.3f} ± {:.3f} by Student's t"),
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
    ("claims_minigpt4/vtc-guided", None, "mean", "`guided` kept {:.3f} ± {:.3f} (by seed 0.991"),
    ("claims_minigpt4/vtc-random", None, "mean", "`random` {:.3f} ± {:.3f} (0.998"),
    ("claims_minigpt4/vtc-uniform", None, "mean", "queries, {:.3f} ± {:.3f} (0.943"),
    ("claims_minigpt4/vtc-uniform", "claims_minigpt4/vtc-guided", "mean", "(than `guided` by {:.3f} ± {:.3f}, than"),
    ("claims_minigpt4/vtc-uniform", "claims_minigpt4/vtc-random", "mean", "than `random` by {:.3f} ± {:.3f}), which"),
    ("claims_minigpt4/vtc-uniform", None, "counting", "loses counting ({:.3f} ± {:.3f})"),
    ("claims_minigpt4/vtc-uniform", None, "relation", "more than a fifth of relations ({:.3f} ± {:.3f})"),
    ("claims_minigpt4/vtc-uniform", None, "ocr", "`uniform` keeps reading ({:.3f} ± {:.3f}) and not counting"),
    ("claims_minigpt4/lds", None, "mean", "alone kept {:.3f} ± {:.3f} and saved 7 %"),
    ("claims_minigpt4/lds", None, "ocr", "reading was lower in all seeds ({:.3f} ± {:.3f})"),
    ("claims_minigpt4/sts-uniform", "claims_minigpt4/vtc-uniform", "mean", "took a further {:.3f} ± {:.3f} (`uniform`)"),
    ("claims_minigpt4/sts-guided", "claims_minigpt4/vtc-guided", "mean", "{:.3f} ± {:.3f} (`guided`), 0.007"),
    ("claims_minigpt4/sts-random", "claims_minigpt4/vtc-random", "mean", "{:.3f} ± {:.3f} (`random`). - Against"),
    ("claims_minigpt4/sts-guided", None, "mean", "and keep {:.3f} ± {:.3f} (`guided`)"),
    ("claims_minigpt4/sts-random", None, "mean", "{:.3f} ± {:.3f} (`random`), 0.929"),
    ("claims_minigpt4/sts-uniform", None, "mean", "{:.3f} ± {:.3f} (`uniform`): **in the mean"),
    ("claims_minigpt4/vtc-uniform", "claims_minigpt4/vtc-guided", "relation", "in all seeds, by {:.3f} ± {:.3f}, as"),
    ("claims_minigpt4/vtc-uniform", "claims_minigpt4/vtc-random", "relation", "as with `random`, by {:.3f} ± {:.3f}: of"),
    ("alignment_lds/in-both", None, "relation", "relations of `in-both` ({:.3f} ± {:.3f})"),
]  # fmt: skip
"""A case, the one that is better, in what, and how the study says by how much; without a better one what the case keeps."""


BASES = {
    "recipes": "recipes",
    "learning_rates": "recipes",
    "less_lds": "less_lds",
    "claims_minigpt4": "claims_minigpt4",
    **dict.fromkeys(("schedules", "masks", "updates"), "equal_flops"),
}
"""By sweep where its dense runs are, if not in claims_llava."""


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("claims_llava", r"of the (\d+) that are, (\d+) are so by Student's t over seeds too\. \("),
        ("reading", r"Of the (\d+) bold cells (\d+) are so by Student's t over seeds too"),
        ("claims_minigpt4", r"of the (\d+) that are, (\d+) are so by Student's t over seeds too \(existence of `vtc"),
    ],
)
def test_bold_cells(sweep: str, words: str) -> None:
    """How many families' bootstrap intervals leave 1 out, and of these, how many Student's t over the seeds does too."""
    kept = rows_of(f"{sweep}.overview")[1:]
    raw = [row for name in {BASES.get(sweep, "claims_llava"), sweep} for row in rows_of(name)]
    by_run, bold, by_t = {row["run"]: row for row in raw}, 0, 0
    seeds = {row["seed"] for row in rows_of(sweep)}
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
                for seed in seeds
            ]
            by_t += abs(fmean(shares) - 1) > half_width(shares)
    [told] = re.findall(words, TEXT)
    assert (bold, by_t) == (int(told[0]), int(told[1]))


@pytest.mark.parametrize(("case", "better", "of", "words"), SHARES)
def test_intervals(case: str, better: str | None, of: str, words: str) -> None:
    """Of shares of the dense accuracy, seed by seed, with their 95 % interval by Student's t."""
    ours = accuracies(case, of)
    dense = accuracies(f"{BASES.get(case.partition('/')[0], 'claims_llava')}/dense", of)
    assert len(ours) == len(dense)
    found = [ours[seed] / dense[seed] for seed in ours]
    if better is not None:
        theirs = accuracies(better, of)
        found = [(theirs[seed] - ours[seed]) / dense[seed] for seed in ours]
    assert words.format(fmean(found), half_width(found)) in TEXT + LDS.replace("\n", " ")


@pytest.mark.parametrize(
    ("case", "column", "words"),
    [
        ("alignment_lds/in-both", "alignment.last_loss", "the loss of captions was {:.2f}, {:.2f} and {:.2f} by seed"),
        ("updates/inverse_keep", "finetune.first_loss", "({:.2f}, {:.2f} and {:.2f} in the first 20 steps; `paper`"),
        ("schedules/paper", "finetune.first_loss", "`paper` {:.2f}, {:.2f} and {:.2f})"),
        ("claims_llava/dense", "alignment.last_loss", "by seed, dense {:.2f}, {:.2f} and {:.2f}"),
    ],
)
def test_losses_by_seed(case: str, column: str, words: str) -> None:
    assert words.format(*by_seed(case, column).values()) in TEXT


def test_inverse_keep() -> None:
    """Its validation loss beside that of ``paper``, seed by seed."""
    paper, ours = (by_seed(case, "finetune.validation_loss") for case in ("schedules/paper", "updates/inverse_keep"))
    lower = [paper[seed] - ours[seed] for seed in paper]
    assert min(lower) > 0
    assert f"in each seed, by {fmean(lower):.4f} ± {half_width(lower):.4f}, which" in TEXT


def test_pairs() -> None:
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
        assert words.format(*(ours[seed] / dense[seed] for seed in ours)) in PAGES
    fast_mean, dense_mean = (
        fmean(accuracies(f"learning_rates/{case}-5e-4", "mean").values()) for case in ("fast", "dense")
    )
    assert f"of dense at 5e-4 that is {fast_mean / dense_mean:.3f}" in PAGES


@pytest.mark.parametrize(
    ("sweep", "words"),
    [("masks", "of {} comparisons this one shows"), ("updates", "Of {} comparisons one shows")],
)
def test_comparisons(sweep: str, words: str) -> None:
    """With ``paper``, of each case in each family and the mean: in how many Student's t over seeds leaves 0 out."""
    columns = ("mean", "existence", "relation", "counting", "ocr", "choice", "paired")
    raw = rows_of(f"{sweep}")
    cases, shown = sorted({row["case"] for row in raw}), 0
    for case in cases:
        for of in columns:
            ours, paper, dense = (accuracies(name, of) for name in (f"{sweep}/{case}", "schedules/paper", "equal_flops/dense"))  # fmt: skip
            lost = [(paper[seed] - ours[seed]) / dense[seed] for seed in dense]
            shown += abs(fmean(lost)) > half_width(lost)
    assert shown == 1 and words.format(len(cases) * len(columns)) in PAGES


def test_rounds() -> None:
    """Their first losses and their last validation losses beside ``paper``'s."""
    paper = by_seed("schedules/paper", "finetune.first_loss").values()
    rounds = sorted(loss for layers in (2, 4) for loss in by_seed(f"masks/rounds-of-{layers}", "finetune.first_loss").values())  # fmt: skip
    words = "({:.1f} to {:.1f} in the first 20 steps but for one run, `paper` {:.1f} to {:.1f})"
    assert words.format(rounds[1], rounds[-1], min(paper), max(paper)) in PAGES and rounds[0] < max(paper)
    ours, theirs = (by_seed(case, "finetune.validation_loss") for case in ("masks/rounds-of-2", "schedules/paper"))
    assert all(ours[seed] > theirs[seed] for seed in theirs)
