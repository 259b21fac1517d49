"""lmms-eval's own task code and ours, given the same documents and answers: the same prompts, credits and scores.

Where the rules differ, it is in the README's tables of answers, and nowhere else.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest

from megatron_sts.evaluate.benchmarks.mme import COGNITION, PERCEPTION
from megatron_sts.evaluate.benchmarks.question import Question
from megatron_sts.evaluate.metrics import yes_rates
from megatron_sts.evaluate.vqa_text import normalise
from tests.evaluate.benchmarks import lmms_tasks, official_files
from tests.evaluate.benchmarks.lmms_tasks import Pair, pair_of
from tests.evaluate.benchmarks.test_answer_rules import LMMS_VERSION, READINGS, said

pytest.importorskip(
    "lmms_eval", reason="lmms-eval is not installed; bash tests/evaluate/lmms.sh runs these tests with it"
)
if version("lmms_eval") != LMMS_VERSION:
    pytest.skip(f"the numbers are those of lmms-eval {LMMS_VERSION}", allow_module_level=True)

POPE_SPLITS = {"random": "random", "popular": "pop", "adversarial": "adv"}
MORE_OF_VQAV2 = (
    (262148003, 262148, "What is it?", "what is", "other", ["dog"] * 5 + ["cat"] * 5),
    (262148004, 262148, "What does he wear?", "what does the", "other",
     ["t-shirt"] * 3 + ["a t shirt"] * 2 + ["he's"] * 2 + ["hes", "1,000", "3.5"]),
    (262148005, 262148, "Is it on?", "is it", "yes/no", ["Yes", "yes.", "YES!", "no", "not sure"] * 2),
)  # fmt: skip
"""A tie, references that are the same only when normalised, and few of each."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    made = tmp_path_factory.mktemp("parity")
    files = official_files
    pope, mme = files.pope(made / "pope"), files.mme(made / "mme", (*PERCEPTION, *COGNITION))
    scienceqa, gqa = files.scienceqa(made / "scienceqa"), files.gqa(made / "gqa")
    vqav2 = files.vqav2(made / "vqav2", MORE_OF_VQAV2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(made / "cache"))
        splits = {
            f"pope {split}": pair_of("pope", f"pope/pope_{short}.yaml", pope, lmms_tasks.pope(pope), made, f"{split}/")
            for split, short in POPE_SPLITS.items()
        }
        return splits | {
            "pope": pair_of("pope", "pope/pope.yaml", pope, lmms_tasks.pope(pope), made),
            "mme": pair_of("mme", "mme/mme.yaml", mme, lmms_tasks.mme(mme), made),
            **{
                name: pair_of(name, f"scienceqa/{name}.yaml", scienceqa, lmms_tasks.scienceqa(scienceqa), made)
                for name in ("scienceqa", "scienceqa_img")
            },
            "gqa": pair_of("gqa", "gqa/gqa.yaml", gqa, lmms_tasks.gqa(gqa), made),
            "vqav2": pair_of("vqav2", "vqav2/vqav2_val.yaml", vqav2, lmms_tasks.vqav2(vqav2), made),
        }


NAMES = ("pope random", "pope popular", "pope adversarial", "pope", "mme", "scienceqa", "scienceqa_img", "gqa", "vqav2")
ALIKE = {
    "pope": ["yes", "Yes", "YES", "yEs", " yes ", "yes\n", "no", "No", " no", "\tNo\n"],
    "mme": ["Yes", "Yes.", "YES!", " yes, there is", "A yes", "Oh yes", "no", "No.", "NO", "no, it isn't", "Nope", "not sure", "none",
            "nothing", "The answer is yes", "maybe", "2", "eyes", "", ".", "?"],
    "scienceqa": ["A", "B", " A ", "C", "D\n", "A. Maryland", "B. down", "C. ", "E. x", "(A)", "A)", "A) hard", "Answer: B", "Ohio", "the b",
                  "The answer is A", "AB", "1", ""],
    "gqa": ["no", "No", "NO.", "Yes.", "woman", "Woman", "a woman", "the woman", "women", "blue", " blue ", "Blue...", "dark blue",
            "blue's", "two", "2", ""],
    "vqav2": ["2", "two", "the two", "none", "ten", "3", "3.5", "3.", "1,000", "1000", "1, 000", "down", "Down.", "a down", "down!", "at table",
              "At the table", "at  table", "dog", "dogs", "The dog.", "dog/cat", "dog, cat", "dog\ncat", "cat", "cat's", "cats'", "t-shirt",
              "tshirt", "t shirt", "he's", "hes", "He's!", "its", "it's", "dont", "Don't", "yes", "Yes", "no", "not sure", "yes!", "$5", "é",
              "“no”", "'", "-", ".", "", "a", "stop"],
}  # fmt: skip
"""Answers to which both rules give the same credit, whatever the reference; in VQA v2 unless all references are the same."""
Scores = dict[str, Callable[[dict[str, Any], str], float]]
OF_SPLIT: Scores = {
    "pope_accuracy": lambda found, split: found["split"][split]["accuracy"],
    "pope_precision": lambda found, split: found["split"][split]["precision"],
    "pope_recall": lambda found, split: found["split"][split]["recall"],
    "pope_f1_score": lambda found, split: found["split"][split]["f1"],
}
EQUAL: dict[str, Scores] = {
    **{f"pope {split}": OF_SPLIT for split in POPE_SPLITS},
    "pope": {"pope_accuracy": lambda found, _: found["accuracy"]},
    "mme": {
        "mme_perception_score": lambda found, _: found["perception"],
        "mme_cognition_score": lambda found, _: found["cognition"],
    },
}
"""Of a score of lmms-eval's, the one of ours that it equals; where nothing is said, ``exact_match`` is ``accuracy``."""
COLUMN = {"pope": 1, "mme": 3, "scienceqa": 5, "gqa": 7}
"""Of the official rule in the README's table; lmms-eval's is the next."""


def of(name: str) -> str:
    """The benchmark whose rules a pair has."""
    return name.split(" ")[0].removesuffix("_img")


def same(found: Any) -> Any:
    """Sums and means of the same terms may be rounded in another order."""
    return pytest.approx(found, rel=1e-12, abs=0)


def is_unanimous(question: Question) -> bool:
    """VQA v2's official rule normalises nothing where all ten references are the same; lmms-eval's does."""
    return len(question.references) > 1 and len(set(question.references)) == 1


def alike(name: str, question: Question) -> list[str]:
    [first, *_] = question.references
    return [first, first.upper(), f"{first.capitalize()}.", ""] if is_unanimous(question) else ALIKE[of(name)]


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_the_same(pairs: dict[str, Pair], name: str) -> None:
    pair = pairs[name]
    texts = [pair.task.doc_to_text(document) for document in pair.documents]
    assert texts == [question.prompt for question in pair.questions]
    visuals = [pair.task.doc_to_visual(document) for document in pair.documents]
    assert [len(shown) for shown in visuals] == [int(question.image is not None) for question in pair.questions]


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_equal_number_by_number(pairs: dict[str, Pair], name: str) -> None:
    pair, rng, seen = pairs[name], random.Random(name), set()
    scores = EQUAL.get(name, {"exact_match": lambda found, _: found["accuracy"]})
    for _ in range(60):
        share = rng.random()
        answers = [
            rng.choice(question.references if rng.random() < share else alike(name, question))
            for question in pair.questions
        ]
        (their_credits, theirs), (our_credits, ours) = pair.theirs(answers), pair.ours(answers)
        assert their_credits == same(our_credits), answers
        expected = {key: find(ours, name.rpartition(" ")[2]) for key, find in scores.items()}
        assert {key: theirs[key] for key in scores} == same(expected), answers
        seen.add(tuple(theirs.values()))
    assert len(seen) >= 3  # not always all or nothing


@pytest.mark.parametrize("name", NAMES)
def test_each_awkward_answer_earns_the_same_of_each_document(pairs: dict[str, Pair], name: str) -> None:
    pair = pairs[name]
    for text in ALIKE[of(name)]:
        everywhere = [text] * len(pair.questions)
        theirs, ours = pair.theirs(everywhere)[0], pair.ours(everywhere)[0]
        for question, their, our in zip(pair.questions, theirs, ours, strict=True):
            if is_unanimous(question):
                assert their == float(normalise(text) == normalise(question.references[0])) >= our, text
            else:
                assert their == same(our), (text, question)


@pytest.mark.parametrize("name", NAMES)
def test_credits_differ_only_where_the_readme_says_so(pairs: dict[str, Pair], name: str) -> None:
    pair = pairs[name]
    for row in READINGS:
        everywhere = [said(row[0])] * len(pair.questions)
        theirs, ours = pair.theirs(everywhere)[0], pair.ours(everywhere)[0]
        differing = [q for q, their, our in zip(pair.questions, theirs, ours, strict=True) if their != same(our)]
        if of(name) == "vqav2":
            assert all(map(is_unanimous, differing)), row[0]
            continue
        official, theirs_ = (cell.strip("`") for cell in row[COLUMN[of(name)] : COLUMN[of(name)] + 2])
        affected = [question for question in pair.questions if question.references[0] in (official, theirs_)]
        assert official != theirs_ or not differing, row[0]
        assert official == theirs_ or [q.key for q in differing] == [q.key for q in affected], row[0]


@pytest.mark.parametrize(
    ("name", "text", "label"),
    [("mme", "Y.", "yes"), ("mme", "N", "no"), ("scienceqa", "b", "B"), ("scienceqa", "B.down", "B")],
)
def test_lmms_eval_takes_more_than_the_official_rules(pairs: dict[str, Pair], name: str, text: str, label: str) -> None:
    pair = pairs[name]
    everywhere, truth = [text] * len(pair.questions), [question.references[0] for question in pair.questions]
    assert label in truth
    assert pair.theirs(everywhere)[0] == [float(right == label) for right in truth]
    assert not any(pair.ours(everywhere)[0])


def test_popes_three_splits_are_one_in_lmms_evals_pope(pairs: dict[str, Pair]) -> None:
    """Its precision, recall and F1 are over all of them, and ours are means over the splits, of which the official script scores
    one at a time; ``yes_ratio`` is of the references."""
    pair = pairs["pope"]
    answers = ["yes", "no", "yes", "no", *["yes", "yes", "no", "no"], *["no", "no", "yes", "no"]]
    (_, theirs), (_, ours) = pair.theirs(answers), pair.ours(answers)
    truth = [question.references[0] == "yes" for question in pair.questions]
    pooled = yes_rates([(text == "yes", is_true) for text, is_true in zip(answers, truth, strict=True)])
    found = {key.removeprefix("pope_").removesuffix("_score"): value for key, value in theirs.items()}
    assert {key: found[key] for key in ("precision", "recall", "f1")} == same(
        {key: pooled[key] for key in ("precision", "recall", "f1")}
    )
    assert ours["f1"] == same(sum(split["f1"] for split in ours["split"].values()) / 3) != same(theirs["pope_f1_score"])
    assert theirs["pope_yes_ratio"] == 0.5 != same(ours["yes_rate"])
