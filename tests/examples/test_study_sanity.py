"""What the study says of epochs, of ever fewer tokens and of the grid is what the runs came to."""

from __future__ import annotations

from statistics import fmean

from megatron_sts.report.groups import half_width
from tests.examples.study_results import FAMILIES, TEXT, accuracies, by_seed, rows_of, shares_of

EPOCHS = (1, 3, 5)


def with_width(values: list[float]) -> tuple[float, float]:
    """Their mean, and half of its 95 % interval by Student's t."""
    return fmean(values), half_width(values)


def test_epochs() -> None:
    cases = [(f"epochs/lds-epochs={number}", f"epochs/dense-epochs={number}") for number in EPOCHS]
    kept = [number for pair in cases for number in with_width(shares_of(*pair))]
    words = "LDS kept {:.3f} ± {:.3f} of the accuracy of dense training as long after one epoch, {:.3f} ± {:.3f} after three, {:.3f} ± {:.3f} after five"
    assert words.format(*kept) in TEXT
    assert "{:.3f}, {:.3f} and {:.3f} of dense training as long, after one, three and five".format(*kept[::2]) in TEXT
    losses = [[by_seed(case, "finetune.validation_loss") for case in pair] for pair in cases]
    higher = [[lds[seed] - dense[seed] for seed in dense] for lds, dense in losses]
    assert all(each > 0 for pair in higher for each in pair)
    widths = [number for pair in higher for number in with_width(pair)]
    assert "by {:.4f} ± {:.4f}, {:.4f} ± {:.4f} and {:.4f} ± {:.4f}; the last barely shows it".format(*widths) in TEXT
    assert [fmean(pair) > half_width(pair) for pair in higher] == [False, False, True]
    shares = {(number, of): with_width(shares_of(*pair, of)) for number, pair in zip(EPOCHS, cases, strict=True) for of in ("mean", *FAMILIES)}  # fmt: skip
    [(where, (share, width))] = [(key, found) for key, found in shares.items() if abs(found[0] - 1) > found[1]]
    assert where == (3, "relation") and len(shares) == 21
    assert f"relations after three epochs ({share:.3f} ± {width:.3f})" in TEXT
    gained = []
    for fewer, more in ((1, 3), (3, 5)):
        for case in ("dense", "lds"):
            before, after = (accuracies(f"epochs/{case}-epochs={number}", "mean") for number in (fewer, more))
            gained += with_width([after[seed] - before[seed] for seed in before])
    words = "one epoch to three**, {:.3f} ± {:.3f} of the mean accuracy dense and {:.3f} ± {:.3f} with LDS, which are not told apart; from three to five ({:.3f} ± {:.3f} and {:.3f} ± {:.3f})"
    assert words.format(*gained) in TEXT
    falls = []
    for case in ("dense", "lds"):
        three, five = (by_seed(f"epochs/{case}-epochs={number}", "finetune.validation_loss") for number in (3, 5))
        falls += with_width([three[seed] - five[seed] for seed in three])
    assert "validation loss falls by {:.3f} ± {:.3f} and {:.3f} ± {:.3f}, which".format(*falls) in TEXT
    for number in EPOCHS:
        flops = [fmean(by_seed(f"epochs/{case}-epochs={number}", "finetune.flops_executed").values()) for case in ("lds", "dense")]  # fmt: skip
        assert round(100 * (1 - flops[0] / flops[1])) == 15
    assert "- Fifteen per cent of the FLOPs are saved, whatever" in TEXT
    one, _, five = (shares_of(*pair) for pair in cases)
    change = with_width([after - before for before, after in zip(one, five, strict=True)])
    assert "changed by {:.3f} ± {:.3f}.".format(*change).replace("-", "−") in TEXT


def test_the_course_of_epochs() -> None:
    rows = rows_of("epochs.course")
    by_run: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_run.setdefault(row["run"], []).append(row)
    ends = {row["run"]: float(row["finetune.validation_loss"]) for row in rows_of("epochs")}
    assert {run: round(float(course[-1]["validation_loss"]), 5) for run, course in by_run.items()} == {run: round(loss, 5) for run, loss in ends.items()}  # fmt: skip
    losses = [[float(row["validation_loss"]) for row in course] for course in by_run.values()]
    assert all(course == sorted(course, reverse=True) for course in losses)  # none has begun to rise
    first = {
        case: [
            fmean(float(row["gradient_norm"]) for row in rows if row["run"].startswith(f"{case}-epochs={number}-") and row["epoch"] == "1")
            for number in EPOCHS
        ]
        for case in ("lds", "dense")
    }  # fmt: skip
    last = [fmean(float(row["gradient_norm"]) for row in rows if row["run"].startswith(f"{case}-epochs=5-") and row["epoch"] == "5") for case in first]  # fmt: skip
    assert "(after five epochs {:.2f} and {:.2f})".format(*last) in TEXT
    words = "({:.1f} to {:.1f} in the first epoch, dense {:.1f} to {:.1f})"
    assert words.format(*(each(first[case]) for case in ("lds", "dense") for each in (min, max))) in TEXT


FEWER = ("token_length/keep_ratio=0.75", "claims_llava/vtc-uniform", "token_length/keep_ratio=0.25", "token_length/keep_ratio=0.125")  # fmt: skip
"""Than all tokens in alignment: ever fewer."""


def test_ever_fewer_tokens() -> None:
    dense = "claims_llava/dense"
    flops = [fmean(by_seed(case, "alignment.flops_executed").values()) for case in (dense, *FEWER)]
    words = "alignment's FLOPs 1, {:.2f}, {:.2f}, {:.2f} and {:.2f} of dense's"
    assert words.format(*(each / flops[0] for each in flops[1:])) in TEXT
    ends = [fmean(by_seed(case, "alignment.last_loss").values()) for case in (dense, *FEWER)]
    assert "was {:.2f}, {:.2f}, {:.2f}, {:.2f} and {:.2f} in the mean, from about 2.7".format(*ends) in TEXT
    kept = [shares_of(case, dense) for case in FEWER]
    words = (
        "three quarters kept {:.3f} ± {:.3f} of the dense accuracy (Student's t over seeds), half {:.3f} ± {:.3f}, "
        "a quarter {:.3f} ± {:.3f} (by seed {:.3f}, {:.3f}, {:.3f}), an eighth {:.3f} ± {:.3f} ({:.3f}, {:.3f}, {:.3f})."
    )
    numbers = [*with_width(kept[0]), *with_width(kept[1]), *with_width(kept[2]), *kept[2], *with_width(kept[3]), *kept[3]]  # fmt: skip
    assert words.format(*numbers) in TEXT
    shown = {(case, of): found for case in FEWER[2:] for of in FAMILIES for found in [with_width(shares_of(case, dense, of))] if 1 - found[0] > found[1]}  # fmt: skip
    assert [of for _, of in shown] == ["counting", "counting"]
    assert "({:.3f} ± {:.3f}, {:.3f} ± {:.3f}). The fast".format(*(each for found in shown.values() for each in found)) in TEXT  # fmt: skip
    few = [share for case in kept[2:] for share in case]
    assert f"fine-tuning kept between {min(few):.2f} and {max(few):.2f}, by seed" in TEXT


def test_losses_with_ever_fewer_tokens_are_steady() -> None:
    """After the 20 steps of warm-up each beside the mean of the ten before."""
    rows = rows_of("token_length.losses")
    highest, rises = ({"dense": 0.0, "fewer": 0.0} for _ in range(2))
    for run in list(rows[0])[1:]:
        losses = [float(row[run]) for row in rows]
        kind = "dense" if run.startswith("dense") else "fewer"
        ratios = [loss / fmean(losses[step - 10 : step]) for step, loss in enumerate(losses) if step >= 20]
        highest[kind] = max(highest[kind], *ratios)
        jumps = [loss - fmean(losses[step - 10 : step]) for step, loss in enumerate(losses) if step >= 20]
        rises[kind] = max(rises[kind], *jumps)
    words = "has a loss above {fewer:.2f} times the mean of the ten before (dense {dense:.2f});"
    assert words.format(**highest) in TEXT
    assert "in absolute terms it rises by {fewer:.2f} at most, dense by {dense:.2f}, whose".format(**rises) in TEXT


def test_the_grid() -> None:
    """A column a keep ratio; the first one's first run is dense."""
    columns: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows_of("grid"):
        columns.setdefault(row["stages.alignment.vtc.keep_ratio"], {})[row["case"]] = row
    dense = float(columns["1"]["no-lds"]["eval.mean"])
    kept = {ratio: {case: float(row["eval.mean"]) / dense for case, row in of.items()} for ratio, of in columns.items()}
    assert f"without LDS is dense, at {dense:.3f}." in TEXT and list(kept) == ["1", "0.9", "0.7", "0.5", "0.3"]
    widest = max(max(of.values()) - min(of.values()) for of in kept.values())
    assert f"the eight lie within {widest:.2f} of each other" in TEXT
    losses = [{float(row["alignment.last_loss"]) for row in of.values()} for of in columns.values()]
    assert all(len(each) == 1 for each in losses)  # a column's runs share their alignment
    ends = [loss for [loss] in losses]
    assert "ended at {:.2f}, {:.2f}, {:.2f}, {:.2f} and {:.2f}, from left".format(*ends) in TEXT
    without_lds = [of["no-lds"] for of in kept.values()]
    assert sorted(range(5), key=ends.__getitem__) == sorted(range(5), key=without_lds.__getitem__, reverse=True)
    told = (kept[ratio]["no-lds"] for ratio in ("0.5", "0.9", "0.3"))
    assert "half of the tokens kept {:.2f}, nine tenths {:.2f} and three tenths {:.2f}:".format(*told) in TEXT
    lowest = {ratio: min(of, key=of.__getitem__) == "alpha0.7-epsilon0.3" for ratio, of in kept.items()}
    assert lowest == {"1": True, "0.9": False, "0.7": True, "0.5": True, "0.3": True}
    more_alpha = [of[f"alpha0.3-epsilon{e}"] > of[f"alpha0.5-epsilon{e}"] for of in kept.values() for e in (0.3, 0.5, 0.7)]  # fmt: skip
    more_epsilon = [of[f"alpha{a}-epsilon0.7"] > of[f"alpha{a}-epsilon0.3"] for of in kept.values() for a in (0.3, 0.5)]
    words = "in {} pairs of {}, ε 0.7 more than 0.3 at the same α in {} of {}."
    assert words.format(sum(more_alpha), len(more_alpha), sum(more_epsilon), len(more_epsilon)) in TEXT
    overview = rows_of("grid.overview")[1:]
    widths = [(float(row["mean.of_first.high"]) - float(row["mean.of_first.low"])) / 2 for row in overview]
    assert f"uncertain by {min(widths):.2f} to {max(widths):.2f}." in TEXT
