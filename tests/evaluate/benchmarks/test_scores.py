"""The official metrics against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sts.evaluate.benchmarks.mme import COGNITION, PERCEPTION, yes_or_no
from megatron_sts.evaluate.benchmarks.pope import says_yes
from megatron_sts.evaluate.benchmarks.question import Answer, Question, by_family
from megatron_sts.evaluate.benchmarks.registry import BENCHMARKS, read_exams
from megatron_sts.evaluate.benchmarks.runner import result
from megatron_sts.evaluate.benchmarks.vqav2 import vqa_accuracy
from megatron_sts.evaluate.metrics import Metrics
from tests.evaluate.benchmarks import official_files


def answered(name: str, folder: Path, said: dict[str, str]) -> list[Answer]:
    """The answers ``said`` by key; every question must have one."""
    [exam] = read_exams([f"{name}={folder}"], [])
    assert said.keys() == {question.key for question in exam.questions}
    return [Answer(question, said[question.key]) for question in exam.questions]


def accuracies(groups: dict[str, Metrics]) -> dict[str, float]:
    return {name: found["accuracy"] for name, found in groups.items()}


def test_gqa(tmp_path: Path) -> None:
    # right but for the first; a full stop and capitals do not matter, another word does
    said = {"201307251": "no, it is not", "201640614": "Woman.", "202225914": "blue", "20602949": "Blue"}
    answers = answered("gqa", official_files.gqa(tmp_path), said)
    found = BENCHMARKS["gqa"].score(answers)
    assert found["accuracy"] == 3 / 4 and found["num_questions"] == 4
    assert accuracies(found["structural"]) == {"choose": 1.0, "query": 1.0, "verify": 0.0}
    assert accuracies(found["semantic"]) == {"attribute": 1.0, "relation": 1.0, "scene": 0.0}
    assert accuracies(found["answer"]) == {"binary": 1 / 2, "open": 1.0}


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        # Leaving out one of n equal references leaves n - 1. Of ten, n times min((n - 1) / 3, 1), else min(n / 3, 1).
        ("down", ["down"] * 10, 1.0),
        ("down", ["down"] * 4 + ["up"] * 6, 1.0),  # (4 * 3/3 + 6 * 1) / 10
        ("down", ["down"] * 3 + ["up"] * 7, 0.9),  # (3 * 2/3 + 7 * 1) / 10
        ("down", ["down"] * 2 + ["up"] * 8, 0.6),  # (2 * 1/3 + 8 * 2/3) / 10
        ("down", ["down"] + ["up"] * 9, 0.3),  # (1 * 0 + 9 * 1/3) / 10
        ("left", ["down"] * 5 + ["up"] * 5, 0.0),
        ("two", ["2"] * 3 + ["the two"] + ["3"] * 6, 1.0),  # 4 equal after normalisation
        ("Yes.", ["yes"] * 10, 1.0),  # handed in as "yes"
        ("2", ["two"] * 10, 0.0),  # nothing is normalised where the references agree
        ("2", ["two"] * 9 + ["3"], 1.0),
    ],
)
def test_vqa_accuracy(answer: str, references: list[str], expected: float) -> None:
    assert vqa_accuracy(answer, references) == pytest.approx(expected)


@pytest.mark.parametrize("words", ["two", "t-shirt", "none", "the beach"])
def test_vqav2_credits_an_answer_that_all_references_give_word_for_word(words: str) -> None:
    question = Question("1", "", None, (words,) * 10, "other")
    assert BENCHMARKS["vqav2"].credit(Answer(question, words)) == 1.0


def test_vqav2(tmp_path: Path) -> None:
    said = {"262148000": "At table.", "262148001": "Two", "393225000": "go", "393225001": "Yes"}
    answers = answered("vqav2", official_files.vqav2(tmp_path), said)
    found = BENCHMARKS["vqav2"].score(answers)
    # "at table" 3 of 10: 0.9. "2" 9 of 10: 1. "go": 0. "Yes" is handed in as "yes", as LLaVA does: 1.
    assert found["accuracy"] == pytest.approx((0.9 + 1 + 0 + 1) / 4)
    assert accuracies(found["answer_type"]) == pytest.approx({"number": 1.0, "other": 0.45, "yes/no": 1.0})
    assert accuracies(found["question_type"])["how many people are"] == 1.0
    families = accuracies(by_family(answers, BENCHMARKS["vqav2"].credit))
    assert families == pytest.approx({"counting": 1.0, "ocr": 0.0, "other": 0.9, "yes/no": 1.0})


def test_scienceqa(tmp_path: Path) -> None:
    said = {"11": "B", "22": "A. up", "33": "The answer is B.", "44": "so"}
    answers = answered("scienceqa", official_files.scienceqa(tmp_path), said)
    found = BENCHMARKS["scienceqa"].score(answers)
    assert found["accuracy"] == 3 / 4
    assert accuracies(found["subject"]) == {"LAN": 1.0, "NAT": 1 / 2, "SOC": 1.0}
    assert accuracies(found["context"]) == {"IMG": 1.0, "NO": 1.0, "TXT": 1 / 2}  # 33 has text and image
    assert accuracies(found["grade"]) == {"G1-6": 1.0, "G7-12": 1 / 2}
    assert accuracies(found["topic"]) == {"physics": 1 / 2, "us-history": 1.0, "word-study": 1.0}


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        *[("B", 1), ("B. cat", 1), ("The answer is B.", 1), ("The answer is B. The answer is A.", 0)],
        *[("A", 0), ("b", 0), ("B.", 0), ("BA. cat", 0), ("", 0)],
    ],
)
def test_scienceqa_finds_the_letter_as_llava_does(text: str, is_right: int) -> None:
    question = Question("1", "", None, ("B",), "choice")
    assert BENCHMARKS["scienceqa"].credit(Answer(question, text)) == is_right


def test_pope(tmp_path: Path) -> None:
    # The references of each split are yes, no, yes, no.
    rows = {"random": ("Yes", "Yes", "no", "No"), "popular": ("yes",) * 4, "adversarial": ("No",) * 4}
    said = {f"{split}/{number}": text for split, texts in rows.items() for number, text in enumerate(texts, 1)}
    found = BENCHMARKS["pope"].score(answered("pope", official_files.pope(tmp_path), said))
    random, popular, adversarial = (found["split"][name] for name in rows)
    # random: said yes twice, of which once rightly; two are true
    assert (random["accuracy"], random["precision"], random["recall"]) == (0.5, 0.5, 0.5)
    assert (random["f1"], random["yes_rate"]) == (0.5, 0.5)
    assert (popular["accuracy"], popular["precision"], popular["recall"]) == (0.5, 0.5, 1.0)
    assert (popular["f1"], popular["yes_rate"]) == (pytest.approx(2 / 3), 1.0)
    assert (adversarial["accuracy"], adversarial["precision"], adversarial["recall"]) == (0.5, 0.0, 0.0)
    assert (adversarial["f1"], adversarial["yes_rate"]) == (0.0, 0.0)
    assert found["f1"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert found["yes_rate"] == pytest.approx(1 / 2)


@pytest.mark.parametrize(
    ("text", "is_yes"),
    [
        *[("Yes", True), ("No", False), ("no", False), ("There is not", False), ("No, there is none", False)],
        *[("There is none", True), ("NO", True), ("Yes. No", True), ("", True), ("nothing", True)],  # odd, but official
    ],
)
def test_pope_reads_answers_as_its_script_does(text: str, is_yes: bool) -> None:
    assert says_yes(text) is is_yes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[("Yes", "yes"), ("YES!", "yes"), ("Ayes", "yes"), ("No.", "no"), ("None", "no"), ("Not sure", "no")],
        *[("A no", "no"), ("A: no", "other"), ("The answer is yes", "other"), ("y", "other"), ("", "other")],
    ],
)
def test_mme_reads_answers_as_its_script_does(text: str, expected: str) -> None:
    assert yes_or_no(text) == expected


def test_mme(tmp_path: Path) -> None:
    folder = official_files.mme(tmp_path, ("count", "OCR"))
    # count: one image with both right, one with one; OCR: one image with one right, one with none
    right, half, none = ("Yes", "No"), ("Yes", "yes"), ("No", "maybe")
    rows = {"count/0001": right, "count/0002": half, "OCR/0001": half, "OCR/0002": none}
    said = {f"{image}/{place}": text for image, texts in rows.items() for place, text in enumerate(texts)}
    answers = answered("mme", folder, said)
    found = BENCHMARKS["mme"].score(answers)
    count, ocr = found["subtask"]["count"], found["subtask"]["OCR"]
    assert (count["accuracy"], count["accuracy_plus"], count["score"]) == (3 / 4, 1 / 2, 125.0)
    assert (ocr["accuracy"], ocr["accuracy_plus"], ocr["score"]) == (1 / 4, 0.0, 25.0)
    assert count["num_questions"] == 4 and count["num_images"] == 2
    assert found["total"] == 150.0
    assert "perception" not in found and "cognition" not in found  # a sum over some subtasks is not the official one
    assert accuracies(by_family(answers, BENCHMARKS["mme"].credit)) == {"counting": 3 / 4, "ocr": 1 / 4}


def test_mme_totals(tmp_path: Path) -> None:
    folder = official_files.mme(tmp_path, PERCEPTION + COGNITION)
    [exam] = read_exams([f"mme={folder}"], [])
    # In perception always yes: accuracy 1/2, accuracy+ 0. In cognition all is right: 200.
    answers = [
        Answer(question, question.references[0] if question.groups["subtask"][0] in COGNITION else "yes")
        for question in exam.questions
    ]
    found = BENCHMARKS["mme"].score(answers)
    assert (found["perception"], found["cognition"], found["total"]) == (10 * 50.0, 4 * 200.0, 1300.0)


def test_scenes() -> None:
    [exam] = read_exams(["scenes"], [])
    assert BENCHMARKS["scenes"].score([Answer(question, question.references[0]) for question in exam.questions])[
        "accuracy"
    ] == pytest.approx(1.0)
    # always "yes": right for half of existence, relation's half of relation, and half of the pairs' questions
    found = BENCHMARKS["scenes"].score([Answer(question, "yes") for question in exam.questions])
    assert found["accuracy"] == pytest.approx((1 / 2 + 1 / 4 + 1 / 2) / 6)
    assert found["metrics"]["paired"]["accuracy_plus"] == 0.0
    assert found["metrics"]["existence"]["f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("name", "said", "num_unread"),
    [
        ("gqa", ["yes", ".", "", "what"], 2),
        ("vqav2", ["the", "dog", "", "2"], 2),
        ("scienceqa", ["C", "C", "b", "B"], 2),  # the first question has a choice C, the second none
        (
            "pope",
            ["Yes.", "NO", "y", "not", "", "no", "yes, it is", "There is one", "No", "a. yes", "Yes!", "nothing"],
            6,
        ),
        ("mme", ["yes", "y", "", "The answer is yes", "No.", "yes", "no", "nothing"], 3),
    ],
)
def test_answers_that_no_rule_could_read_are_counted(
    name: str, said: list[str], num_unread: int, tmp_path: Path
) -> None:
    files = official_files.mme(tmp_path, ("count", "OCR")) if name == "mme" else getattr(official_files, name)(tmp_path)
    [exam] = read_exams([f"{name}={files}"], [])
    answers = [Answer(question, text) for question, text in zip(exam.questions, said, strict=True)]
    assert result(exam, answers, {})["num_unread"] == num_unread
