"""The benchmarks' metrics of predicted answers, one function a question family. Pure; knows no tensors and no model.

Accuracies come with the standard error of a proportion, sqrt(p (1 - p) / n).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sts.evaluate.vqa_text import normalise

Metrics = dict[str, Any]
"""JSON-ready. Always holds ``accuracy``, ``standard_error`` and ``num_questions``; of ``score`` also ``right``: of each question a 1 or a
0, in order, so that runs can be compared question by question."""


@dataclass(frozen=True)
class Answered:
    """One question and what the model said."""

    family: str
    variant: str
    """Negatives of ``existence``, fact of ``paired``; else unused."""
    answer: str
    """The reference."""
    prediction: str
    """The reference itself exactly if the model's greedy answer equals it; else where the two part."""
    pair: str | None = None
    """Shared by the two questions of a pair."""


def score(family: str, answered: Sequence[Answered]) -> Metrics:
    """The metrics of one reported family; ``relation`` pools the asked families relation and category."""
    right = "".join("1" if _RIGHT[family](item) else "0" for item in answered)
    return {**_SCORES[family](answered), "right": right}


def proportion(hits: Iterable[bool]) -> Metrics:
    """Accuracy, its standard error and the number of questions (all 0 without questions)."""
    marks = list(hits)
    share = sum(marks) / len(marks) if marks else 0.0
    error = math.sqrt(share * (1 - share) / len(marks)) if marks else 0.0
    return {"accuracy": share, "standard_error": error, "num_questions": len(marks)}


def average(credits: Iterable[float]) -> Metrics:
    """As ``proportion``, of credits between 0 and 1; the standard error is their standard deviation / sqrt(n)."""
    values = list(credits)
    if not values:
        return proportion([])
    mean, num = sum(values) / len(values), len(values)
    error = math.sqrt(sum((value - mean) ** 2 for value in values)) / num
    return {"accuracy": mean, "standard_error": error, "num_questions": num}


def yes_rates(said_and_true: Sequence[tuple[bool, bool]]) -> Metrics:
    """Precision, recall and F1 of "yes" and the share of "yes", from whether each answer and each reference is "yes".

    Precision and recall are 0 where nothing was predicted or nothing was true.
    """
    num_said, num_true = sum(said for said, _ in said_and_true), sum(true for _, true in said_and_true)
    num_both = sum(said and true for said, true in said_and_true)
    return {
        "precision": num_both / num_said if num_said else 0.0,
        "recall": num_both / num_true if num_true else 0.0,
        "f1": 2 * num_both / (num_said + num_true) if num_said + num_true else 0.0,
        "yes_rate": num_said / len(said_and_true) if said_and_true else 0.0,
    }


def pope(answered: Sequence[Answered]) -> Metrics:
    """POPE: accuracy, precision, recall and F1 of "yes", share of "yes"; over all and per kind of negatives."""
    variants = _by(answered, lambda item: item.variant)
    return {**_yes_no(answered), "variants": {name: _yes_no(group) for name, group in sorted(variants.items())}}


def gqa(answered: Sequence[Answered]) -> Metrics:
    """GQA: exact match over all questions, and apart for each asked family."""
    families = _by(answered, lambda item: item.family)
    apart = {name: proportion(map(_is_equal, group)) for name, group in sorted(families.items())}
    return {**proportion(map(_is_equal, answered)), "families": apart}


def vqa(answered: Sequence[Answered]) -> Metrics:
    """VQA v2 with a single reference: exact match after its text normalisation."""
    return proportion(map(_is_equal_normalised, answered))


def science_qa(answered: Sequence[Answered]) -> Metrics:
    """ScienceQA: the predicted letter is the right one."""
    return proportion(map(_is_equal, answered))


def mme(answered: Sequence[Answered]) -> Metrics:
    """MME: accuracy over questions and, as accuracy+, over pairs with both questions right; also per fact."""
    facts = _by(answered, lambda item: item.variant)
    return {**_pairs(answered), "facts": {name: _pairs(group) for name, group in sorted(facts.items())}}


def _pairs(answered: Sequence[Answered]) -> Metrics:
    pairs = _by(answered, lambda item: item.pair or "")
    plus = proportion(all(map(_is_first_word_right, group)) for group in pairs.values() if len(group) == 2)
    return {
        **proportion(map(_is_first_word_right, answered)),
        "accuracy_plus": plus["accuracy"],
        "standard_error_plus": plus["standard_error"],
        "num_pairs": plus["num_questions"],
    }


def _yes_no(answered: Sequence[Answered]) -> Metrics:
    said_and_true = [(_first_word(item.prediction) == "yes", item.answer == "yes") for item in answered]
    return {**proportion(map(_is_first_word_right, answered)), **yes_rates(said_and_true)}


def _is_equal(item: Answered) -> bool:
    return item.prediction == item.answer


def _is_equal_normalised(item: Answered) -> bool:
    return normalise(item.prediction) == normalise(item.answer)


def _is_first_word_right(item: Answered) -> bool:
    """How scenes read an answer: its first word is yes or no, whatever follows."""
    return _first_word(item.prediction) == item.answer


def _first_word(text: str) -> str:
    return text.split()[0] if text.split() else ""


def _by(answered: Sequence[Answered], key: Callable[[Answered], str]) -> dict[str, list[Answered]]:
    groups = defaultdict(list)
    for item in answered:
        groups[key(item)].append(item)
    return dict(groups)


_SCORES: dict[str, Callable[[Sequence[Answered]], Metrics]] = {
    "existence": pope,
    "relation": gqa,
    "counting": vqa,
    "ocr": vqa,
    "choice": science_qa,
    "paired": mme,
}
"""The reported families, which are those of ``evaluation.families``."""
_RIGHT: dict[str, Callable[[Answered], bool]] = {
    "existence": _is_first_word_right,
    "relation": _is_equal,
    "counting": _is_equal_normalised,
    "ocr": _is_equal_normalised,
    "choice": _is_equal,
    "paired": _is_first_word_right,
}
"""What their ``accuracy`` counts."""
