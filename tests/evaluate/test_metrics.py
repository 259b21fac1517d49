"""The benchmarks' metrics against numbers worked out by hand."""

import math

import pytest

from megatron_sts.config.checks import EVALUATION_FAMILIES
from megatron_sts.evaluate.metrics import Answered, average, proportion, score
from megatron_sts.evaluate.vqa_text import normalise


def answered(family: str, *rows: tuple[str, str], variant: str = "", pair: str | None = None) -> list[Answered]:
    """(reference, prediction) rows."""
    return [Answered(family, variant, answer, prediction, pair) for answer, prediction in rows]


def test_proportion() -> None:
    found = proportion([True, True, True, False])
    assert found == {"accuracy": 0.75, "standard_error": math.sqrt(0.75 * 0.25 / 4), "num_questions": 4}
    assert proportion([]) == {"accuracy": 0.0, "standard_error": 0.0, "num_questions": 0}


def test_average_of_credits() -> None:
    assert average([1, 1, 1, 0]) == pytest.approx(proportion([True, True, True, False]))
    assert average([1, 0.3, 0.2, 0.9]) == pytest.approx(
        {"accuracy": 0.6, "standard_error": math.sqrt(0.16 + 0.09 + 0.16 + 0.09) / 4, "num_questions": 4}
    )
    assert average([]) == proportion([])


def test_pope() -> None:
    random = answered("existence", ("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"), variant="random")
    popular = answered("existence", ("yes", "yes monkey"), ("no", "monkey"), variant="popular")
    found = score("existence", random + popular)
    # said yes: 3, of which true 2; true: 3; right: yes, no, "yes monkey" (its first word)
    assert found["accuracy"] == 3 / 6
    assert (found["precision"], found["recall"], found["f1"]) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert found["yes_rate"] == 3 / 6
    assert found["variants"]["random"]["accuracy"] == found["variants"]["random"]["f1"] == 0.5
    assert found["variants"]["popular"] == pytest.approx(
        {"accuracy": 0.5, "standard_error": math.sqrt(0.125), "num_questions": 2}
        | {"precision": 1.0, "recall": 1.0, "f1": 1.0, "yes_rate": 0.5}
    )


def test_pope_without_a_yes() -> None:
    found = score("existence", answered("existence", ("no", "no"), variant="random"))
    assert found["accuracy"] == 1.0
    assert found["precision"] == found["recall"] == found["f1"] == found["yes_rate"] == 0.0


def test_gqa_pools_and_reports_apart() -> None:
    relation = answered("relation", ("yes", "yes"), ("no", "no"), ("no", "yes"), ("yes", "yes no"))
    category = answered("category", ("food", "food"), ("animal", "food"))
    found = score("relation", relation + category)
    assert found["accuracy"] == 3 / 6 and found["num_questions"] == 6
    assert found["families"]["relation"]["accuracy"] == 2 / 4
    assert found["families"]["category"]["accuracy"] == 1 / 2


def test_vqa() -> None:
    assert score("counting", answered("counting", ("2", "two"), ("3", "2"), ("1", "1.")))["accuracy"] == 2 / 3
    assert score("ocr", answered("ocr", ("4 7", "4 7"), ("4 7", "4"), ("4 7", "7 4")))["accuracy"] == 1 / 3


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The Dog!", "dog"),
        ("a  cat\nand two dogs", "cat and 2 dogs"),
        ("t-shirt", "t shirt"),
        ("yes , no", "yes no"),
        ("1,000", "1000"),
        ("2.5 m.", "2.5 m"),
        ("none", "0"),
        ("4 7 unfinished", "4 7 unfinished"),
        ("don't", "don't"),
        ("Dont", "don't"),
        ("couldnt've couldn'tve", "couldn't've couldn't've"),
        ("well were its", "well were its"),  # words that lack no apostrophe
        ("somebody'd", "somebodyd"),  # so in the official table
        ("3.", "3"),
        ("U.S.A.", "usa"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("." * 33 + "a", "." + "a"),  # the official script takes away 32
    ],
)
def test_vqa_normalisation(text: str, normalised: str) -> None:
    assert normalise(text) == normalised


def test_science_qa_keeps_the_letter_a() -> None:
    assert score("choice", answered("choice", ("a", "a"), ("b", "a"), ("c", "")))["accuracy"] == 1 / 3


def test_mme_counts_pairs_with_both_right() -> None:
    items = answered("paired", ("yes", "yes"), ("no", "no"), variant="count", pair="1")
    items += answered("paired", ("yes", "yes"), ("no", "yes"), variant="count", pair="2")
    items += answered("paired", ("yes", "no"), ("no", "no"), variant="position", pair="3")
    items += answered("paired", ("yes", "yes"), variant="position", pair="cut off")
    found = score("paired", items)
    assert found["accuracy"] == 5 / 7 and found["num_questions"] == 7
    assert found["accuracy_plus"] == 1 / 3 and found["num_pairs"] == 3
    assert found["standard_error_plus"] == pytest.approx(math.sqrt(1 / 3 * 2 / 3 / 3))
    assert found["facts"]["count"]["accuracy_plus"] == 1 / 2
    assert found["facts"]["position"]["accuracy_plus"] == 0.0


@pytest.mark.parametrize("family", EVALUATION_FAMILIES)
def test_right_is_what_accuracy_counts(family: str) -> None:
    """Whatever a family forgives: case of punctuation and numbers' names, words after the first."""
    said = (("yes", "yes ."), ("2", "two"), ("a", "b"), ("no", "yes"), ("4 7", "4 7"), ("3", ""))
    found = score(family, answered(family, *said))
    assert set(found["right"]) == {"0", "1"} and len(found["right"]) == len(said)
    assert found["right"].count("1") / len(said) == found["accuracy"]
