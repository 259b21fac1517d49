"""What the study's pages say of recipes is what the runs came to."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean

import pytest

from megatron_sts.config.load import load
from megatron_sts.report.groups import half_width
from tests.examples.study_results import FAMILIES, PAGES, TEXT, accuracies, by_seed, rows_of, shares_of, wall

ROOT = Path(__file__).resolve().parents[2]
FIRST_PAGE = (ROOT / "README.md").read_text()
RECIPE = ROOT / "examples" / "recipes" / "fast"
SHOWN_DIGITS = 0.005 + 1e-9
"""Two digits behind the point, rounded up or down."""


def test_recipes() -> None:
    """The study's first seed is the quickstart; what pages say of its three seeds is what the runs came to."""
    raw = rows_of("recipes")
    by_case = {case: {row["seed"]: row for row in raw if row["case"] == case} for case in ("dense", "paper", "fast")}
    kept = json.loads((ROOT / "examples/quickstart/expected/comparison.json").read_text())["runs"]
    for case, run in (("dense", "dense"), ("fast", "sts")):
        for family, accuracy in kept[run]["accuracy"].items():
            assert float(by_case[case]["1234"][f"eval.{family}"]) == pytest.approx(accuracy, abs=1e-5)
    times = {seed: wall(by_case["dense"][seed]) / wall(row) for seed, row in by_case["fast"].items()}
    shown = re.findall(r"times as fast, by seed: (\d\.\d+), (\d\.\d+), (\d\.\d+)", PAGES)
    assert [float(each) for each in shown[0]] == pytest.approx([times[seed] for seed in ("1234", "2", "3")], abs=SHOWN_DIGITS)  # fmt: skip
    seconds = {case: sum(map(wall, rows.values())) for case, rows in by_case.items()}
    costs = [flops("recipes/paper") / flops("recipes/dense"), seconds["paper"] / seconds["dense"]]
    assert (
        "the paper's setting of it: VTC in the first, LDS in the second | {:.2f} | {:.2f} |".format(*costs)
        in FIRST_PAGE
    )
    kept = {seed: float(row["eval.mean"]) / float(by_case["dense"][seed]["eval.mean"]) for seed, row in by_case["fast"].items()}  # fmt: skip
    shares = tuple(f"{kept[seed]:.3f}" for seed in ("1234", "2", "3"))
    for text in (FIRST_PAGE, (ROOT / "examples/quickstart/README.md").read_text()):
        assert re.findall(r"kept\s+(\d\.\d+),\s+(\d\.\d+)\s+and\s+(\d\.\d+)", text)[0] == shares
        [span] = re.findall(r"(\d\.\d+)\s+to\s+(\d\.\d+)\s+of\s+the\s+time", text)
        found = [1 / max(times.values()), 1 / min(times.values())]
        assert [float(each) for each in span] == pytest.approx(found, abs=SHOWN_DIGITS)


def test_smollm2() -> None:
    text = TEXT
    raw = rows_of("smollm2")
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


def test_half_of_the_steps() -> None:
    """Dense, as shares of all steps' accuracy, and what the fast recipe keeps more."""
    half, fast = (
        {of: shares_of(case, "recipes/dense", of) for of in ("mean", *FAMILIES)}
        for case in ("half_dense/half-dense", "recipes/fast")
    )
    more = {of: [a - b for a, b in zip(fast[of], half[of], strict=True)] for of in half}
    said = [f"{fmean(kept):.3f}" for kept in half.values()]
    said[0] += f" ± {half_width(half['mean']):.3f}"
    assert f"| half of the steps | {' | '.join(said)} |" in PAGES
    found = [f"{fmean(each):.3f} ± {half_width(each):.3f}" for each in more.values()]
    assert f"| `fast`, less that | {' | '.join(found)} |" in PAGES
    assert [of for of, each in more.items() if fmean(each) > half_width(each)] == ["mean", "relation", "ocr", "choice"]
    by_seed_kept = "{:.3f}, {:.3f} and {:.3f}".format(*half["mean"])
    assert f"half of the steps kept {by_seed_kept} of" in PAGES and f"kept {by_seed_kept}, less in" in PAGES
    assert (
        f"in each seed, by {found[0]}." in PAGES
        and f"in each seed, by {found[0]}; it" in PAGES
        and min(more["mean"]) > 0
    )
    assert f"with both stages halved keeps {fmean(half['mean']):.3f} " in TEXT
    assert f"half of the time, kept {by_seed_kept}." in " ".join(FIRST_PAGE.split())
    cases = ("half_dense/half-dense", "recipes/fast", "recipes/dense")
    ends = [by_seed(case, "alignment.last_loss").values() for case in cases]
    words = "a loss of captions of {:.2f} to {:.2f}, `fast` to {:.2f} to {:.2f}, dense to {:.2f} to {:.2f}."
    assert words.format(*(each(of) for of in ends for each in (min, max))) in TEXT
    stage = load(RECIPE, ["stages.alignment.steps=60"]).stages[0]  # as the sweep has it
    assert stage.optimizer.warmup_steps * 3 == stage.steps and "a third of them warm-up, alignment came" in TEXT


def test_twice_the_steps() -> None:
    """Beside dense training of as many steps, and of half as many."""
    kept, once, beside_half = (
        {of: shares_of(*pair, of) for of in ("mean", *FAMILIES)}
        for pair in (("twice/fast", "twice/dense"), ("recipes/fast", "recipes/dense"), ("twice/fast", "recipes/dense"))
    )
    said = {of: f"{fmean(found):.3f} ± {half_width(found):.3f}" for of, found in kept.items()}
    by_seed_kept = "{:.3f}, {:.3f}, {:.3f}".format(*kept["mean"])
    assert f"in the mean**, below which is not excluded: {said['mean']} (by seed {by_seed_kept}; Student's t)" in TEXT
    quickstart = " ".join((ROOT / "examples/quickstart/README.md").read_text().split())
    assert "three seeds kept {:.3f}, {:.3f} and {:.3f}:".format(*kept["mean"]) in quickstart
    [fast] = [row for row in rows_of("twice.overview") if row["runs"] == "fast"]
    lows = {of: float(fast[f"{of}.of_first.low"]) for of in FAMILIES}
    assert [of for of, low in lows.items() if low < 0.97] == ["counting"]
    high = float(fast["counting.of_first.high"])
    assert f"Counting does not: {said['counting']}, {lows['counting']:.3f} to {high:.3f} by the bootstrap" in TEXT
    assert (
        f"relations too ({said['relation']})" in TEXT and f"all families but counting ({said['counting'][:5]})" in TEXT
    )
    more = {of: [a - b for a, b in zip(kept[of], once[of], strict=True)] for of in kept}
    told = {of: f"by {fmean(found):.3f} ± {half_width(found):.3f}" for of, found in more.items()}
    words = f"in each seed, {told['relation']}, `paired` {told['paired']}, the mean {told['mean']}, counting {told['counting']}:"
    assert words in TEXT and min(more["relation"]) > 0
    assert [of for of, found in more.items() if abs(fmean(found)) > half_width(found)] == ["paired"]
    dense = [fmean(accuracies(f"{sweep}/dense", "mean").values()) for sweep in ("recipes", "twice")]
    assert "gained too, from {:.3f} to {:.3f}.".format(*dense) in TEXT
    costs = [flops(case) for case in ("twice/fast", "recipes/dense")]
    assert f"executes {costs[0] / costs[1]:.2f} of the FLOPs" in TEXT and f"costs {costs[0] / costs[1]:.2f} of the FLOPs" in TEXT  # fmt: skip
    gain = beside_half["mean"]
    assert f"came to {fmean(gain):.3f} ± {half_width(gain):.3f} of their accuracy" in TEXT and min(gain) > 1
    assert "more in each seed ({:.3f}, {:.3f}, {:.3f}):".format(*gain) in TEXT
    assert f"in each seed (by {fmean(gain) - 1:.3f} ± {half_width(gain):.3f})." in TEXT


def test_means_of_four_patches() -> None:
    """On two seeds, beside the fast recipe's."""
    kept = {of: shares_in("pooled/pooled", of) for of in ("mean", "counting", "ocr")}
    fast = shares_in("recipes/fast", "mean")[:2]
    words = "they kept {:.3f} and {:.3f} of the dense accuracy, where `fast` kept {:.3f} and {:.3f} (two seeds, {:.2f} and {:.2f} below it, while its own differ by {:.3f}); counting {:.3f} and {:.3f}, reading least hurt ({:.3f} and {:.3f})."
    below = [a - b for a, b in zip(fast, kept["mean"], strict=True)]
    assert words.format(*kept["mean"], *fast, *below, fast[0] - fast[1], *kept["counting"], *kept["ocr"]) in TEXT
    assert "far less ([{:.2f} and {:.2f}]".format(*kept["mean"]) in TEXT
    hurt = {of: fmean(shares_in("pooled/pooled", of)) for of in FAMILIES}
    assert max(hurt, key=hurt.__getitem__) == "ocr"
    ours, theirs = ([*by_seed(case, "alignment.last_loss").values()][:2] for case in ("pooled/pooled", "recipes/fast"))
    assert "ended at {:.2f} and {:.2f}, that of `fast` at {:.2f} and {:.2f}.".format(*ours, *theirs) in TEXT


def shares_in(case: str, of: str) -> list[float]:
    """Of the dense accuracy of ``recipes``, of the seeds that ``case`` has, in its order."""
    ours, dense = accuracies(case, of), accuracies("recipes/dense", of)
    return [ours[seed] / dense[seed] for seed in ours]


def test_a_shorter_dense_end() -> None:
    """Shares of dense at 8e-4, and what leaving LDS out kept more."""
    families = ("mean", *FAMILIES)
    kept = {case: {of: shares_of(f"short_end/{case}", "recipes/dense", of) for of in families} for case in ("half-lds", "no-lds")}  # fmt: skip
    dense = flops("recipes/dense")
    for case, name in (("half-lds", "LDS in the first half"), ("no-lds", "no LDS")):
        cells = [f"{flops(f'short_end/{case}') / dense:.2f}", *(told(found) for found in kept[case].values())]
        assert f"| {name} | {' | '.join(cells)} |" in TEXT
    by_seed_kept = {case: "{:.3f}, {:.3f}, {:.3f}".format(*found["mean"]) for case, found in kept.items()}
    of_half = f"{fmean(kept['half-lds']['mean']):.3f} (by seed {by_seed_kept['half-lds']})"
    of_none = f"{fmean(kept['no-lds']['mean']):.3f} was kept** (by seed {by_seed_kept['no-lds']};"
    assert f"**LDS in the first half** kept {of_half}" in TEXT and f"- **Without LDS {of_none}" in TEXT
    at_5e4 = told(shares_of("short_end/no-lds", "learning_rates/dense-5e-4", "mean"))
    usual = fmean(shares_of("learning_rates/fast-5e-4", "recipes/dense", "mean"))
    assert f"of dense at 5e-4 that is {at_5e4})" in TEXT and f"its longer end ({usual:.3f})" in TEXT
    longer = {case: shares_of(case, "recipes/dense", "mean") for case in ("fast_parts/no-lds", "recipes/fast")}
    more = [[a - b for a, b in zip(*pair, strict=True)] for pair in ((kept["no-lds"]["mean"], kept["half-lds"]["mean"]), longer.values())]  # fmt: skip
    assert f"here by {told(more[0])}, with" in TEXT and f"by {told(more[1])}. Neither" in TEXT
    assert min(more[0] + more[1]) > 0 and all(fmean(each) < half_width(each) for each in more)
    part = 0.1 * fmean(by_seed("recipes/dense", "finetune.flops_executed").values())
    assert f"has {part / fmean(by_seed('recipes/fast', 'finetune.flops_executed').values()):.2f} of the FLOPs of `fast`'s fine-tuning" in TEXT  # fmt: skip


def flops(case: str) -> float:
    """Of both stages, the mean over seeds."""
    return sum(fmean(by_seed(case, f"{stage}.flops_executed").values()) for stage in ("alignment", "finetune"))


def told(found: list[float]) -> str:
    return f"{fmean(found):.3f} ± {half_width(found):.3f}"


def test_where_the_learning_rate_ends() -> None:
    words = "To 0, from 5e-4, it kept {:.3f} and {:.3f} instead of {:.3f} and {:.3f}, relations less by {:.3f} and {:.3f}; to 3e-4, from 8e-4, {:.3f} and {:.3f} instead of {:.3f} and {:.3f}, counting less by {:.3f} and {:.3f} ("
    numbers = []
    for case, usual, family in (("to-0", "learning_rates/fast-5e-4", "relation"), ("to-3e-4", "recipes/fast", "counting")):  # fmt: skip
        found = {of: shares_in(f"last_rate/{case}", of) for of in ("mean", family)}
        beside = {of: shares_of(usual, "recipes/dense", of)[1:] for of in found}
        numbers += found["mean"] + beside["mean"]
        numbers += [b - a for a, b in zip(found[family], beside[family], strict=True)]
    assert words.format(*numbers) in TEXT


def test_less_lds() -> None:
    raw = rows_of("less_lds")
    dense, less = ({row["seed"]: row for row in raw if row["case"] == case} for case in ("dense", "less-lds"))
    walls = {seed: (wall(dense[seed]), wall(less[seed])) for seed in dense}
    times = [
        fmean(a for a, _ in walls.values()) / fmean(b for _, b in walls.values()),
        *(a / b for a, b in walls.values()),
    ]
    assert "was {:.2f} times as fast as dense (by seed {:.2f}, {:.2f}, {:.2f}, {:.2f})".format(*times) in PAGES
    first = cases_of_recipes("dense"), cases_of_recipes("fast")
    longer = [fmean(wall(row) for row in now.values()) / fmean(map(wall, then)) for now, then in zip((dense, less), first, strict=True)]  # fmt: skip
    assert "dense runs took {:.0f} % longer than then, these {:.0f} % longer".format(*(100 * (each - 1) for each in longer)) in PAGES  # fmt: skip
    counting = {seed: float(less[seed]["eval.counting"]) / float(dense[seed]["eval.counting"]) for seed in dense}
    assert f"scatters from {min(counting.values()):.2f} to {max(counting.values()):.2f} by seed" in PAGES
    ours, theirs = (accuracies(f"less_lds/{case}", "mean") for case in ("less-lds", "dense"))
    fast, base = (accuracies(f"learning_rates/{case}-5e-4", "mean") for case in ("fast", "dense"))
    lost = [fast[seed] / base[seed] - ours[seed] / theirs[seed] for seed in fast]
    assert f"that is {fmean(lost):.3f} ± {half_width(lost):.3f} less than it kept of its own" in PAGES


def cases_of_recipes(case: str) -> list[dict[str, str]]:
    raw = rows_of("recipes")
    return [row for row in raw if row["case"] == case]
