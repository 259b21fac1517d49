"""Each benchmark is read from files in the official format, and asked with LLaVA-1.5's prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_sts.config.checks import EVALUATION_FAMILIES
from megatron_sts.config.errors import ConfigError
from megatron_sts.evaluate.benchmarks.registry import Exam, read_exams
from tests.evaluate.benchmarks import official_files


def read(name: str, folder: Path) -> Exam:
    [exam] = read_exams([f"{name}={folder}"], [])
    return exam


def test_gqa(tmp_path: Path) -> None:
    exam = read("gqa", official_files.gqa(tmp_path))
    assert [question.key for question in exam.questions] == ["201307251", "201640614", "202225914", "20602949"]
    question = exam.questions[1]
    assert question.prompt == "Who is wearing the dress?\nAnswer the question using a single word or phrase."
    assert question.image == tmp_path / "images" / "n235859.jpg"
    assert question.references == ("woman",)
    assert question.groups == {"structural": ("query",), "semantic": ("relation",), "answer": ("open",)}
    assert [question.family for question in exam.questions] == ["scene", "relation", "attribute", "attribute"]


def test_gqa_reads_a_named_split(tmp_path: Path) -> None:
    official_files.gqa(tmp_path)
    (tmp_path / "testdev_balanced_questions.json").rename(tmp_path / "val_balanced_questions.json")
    assert len(read("gqa", tmp_path / "val_balanced_questions.json").questions) == 4


def test_vqav2(tmp_path: Path) -> None:
    questions = read("vqav2", official_files.vqav2(tmp_path)).questions
    assert [question.family for question in questions] == ["other", "counting", "ocr", "yes/no"]
    where = questions[0]
    assert where.key == "262148000"
    assert where.prompt == "Where is he looking?\nAnswer the question using a single word or phrase."
    assert where.image == tmp_path / "val2014" / "COCO_val2014_000000262148.jpg"
    assert where.references == ("down",) * 7 + ("at table",) * 3
    assert where.groups == {"answer_type": ("other",), "question_type": ("none of the above",)}


def test_scienceqa(tmp_path: Path) -> None:
    questions = {question.key: question for question in read("scienceqa", official_files.scienceqa(tmp_path)).questions}
    assert list(questions) == ["11", "22", "33", "44"]
    letter = "\nAnswer with the option's letter from the given choices directly."
    assert questions["11"].prompt == f"What is the colony?\nA. Maryland\nB. Ohio\nC. Utah{letter}"
    hinted = f"Context: Select the better answer.\nWhat do they share?\nA. hard\nB. bendable{letter}"
    assert questions["33"].prompt == hinted
    assert questions["33"].image == tmp_path / "images" / "test" / "33" / "image.png"
    assert questions["33"].references == ("B",)
    assert questions["22"].image is None
    contexts = {key: question.groups["context"] for key, question in questions.items()}
    assert contexts == {"11": ("IMG",), "22": ("NO",), "33": ("TXT", "IMG"), "44": ("TXT",)}
    assert [question.groups["subject"] for question in questions.values()] == [("SOC",), ("LAN",), ("NAT",), ("NAT",)]
    assert [question.groups["grade"][0] for question in questions.values()] == ["G1-6", "G7-12", "G1-6", "G7-12"]
    assert [question.key for question in read("scienceqa_img", tmp_path).questions] == ["11", "33"]


def test_pope(tmp_path: Path) -> None:
    questions = read("pope", official_files.pope(tmp_path)).questions
    assert len(questions) == 12 and len({question.key for question in questions}) == 12
    assert questions[0].prompt == (
        "Is there a snowboard in the image?\nAnswer the question using a single word or phrase."
    )
    assert questions[0].references == ("yes",)
    assert [question.groups["split"][0] for question in questions[::4]] == ["random", "popular", "adversarial"]
    assert {question.family for question in questions} == {"existence"}


def test_pope_with_one_split(tmp_path: Path) -> None:
    assert len(read("pope", official_files.pope(tmp_path, ("popular",))).questions) == 4


def test_mme_in_both_layouts(tmp_path: Path) -> None:
    questions = {question.key: question for question in read("mme", official_files.mme(tmp_path)).questions}
    assert len(questions) == 16
    beside, apart = questions["code_reasoning/0002/0"], questions["artwork/0001/1"]
    assert beside.prompt == "Is it code_reasoning 2?\nAnswer the question using a single word or phrase."
    assert beside.image == tmp_path / "code_reasoning" / "0002.png"
    assert beside.references == ("yes",)
    assert apart.image == tmp_path / "artwork" / "images" / "0001.jpg"
    assert apart.references == ("no",)
    assert apart.groups == {"subtask": ("artwork",), "image": ("artwork/0001",)}
    families = {question.family for question in questions.values()}
    assert families == {"counting", "ocr", "artwork", "code_reasoning"}


def test_scenes() -> None:
    [exam] = read_exams(["scenes"], [])
    assert len(exam.questions) == len({question.key for question in exam.questions}) == 7 * 504
    assert {question.family for question in exam.questions} == set(EVALUATION_FAMILIES)
    assert exam.questions[0].record().images[0]().shape[2] == 3


def test_the_image_comes_first(tmp_path: Path) -> None:
    exam = read("scienceqa", official_files.scienceqa(tmp_path))
    seen, unseen = exam.questions[0].record(), exam.questions[1].record()
    assert [turn.text for turn in seen.turns] == [f"<image>\n{exam.questions[0].prompt}"]
    assert [image().shape for image in seen.images] == [(32, 48, 3)]
    assert unseen.turns[0].text == exam.questions[1].prompt and not unseen.images


def test_images_elsewhere(tmp_path: Path) -> None:
    official_files.pope(tmp_path / "pope")
    (tmp_path / "pope" / "val2014").rename(tmp_path / "coco")
    [exam] = read_exams([f"pope={tmp_path / 'pope'}"], [f"pope={tmp_path / 'coco'}"])
    assert exam.questions[0].image == tmp_path / "coco" / "COCO_val2014_000000310196.jpg"


def test_missing_images_are_counted_and_listed(tmp_path: Path) -> None:
    lost = official_files.gqa(tmp_path) / "images" / "n336443.jpg"
    lost.unlink()
    exam = read("gqa", tmp_path)
    assert [question.key for question in exam.questions] == ["201307251", "201640614"]
    assert exam.missing == [lost] and exam.num_left_out == 2


def break_nothing(folder: Path) -> None:
    official_files.gqa(folder)


def lose_questions(folder: Path) -> None:
    (official_files.gqa(folder) / "testdev_balanced_questions.json").unlink()


def lose_images(folder: Path) -> None:
    for image in (official_files.gqa(folder) / "images").iterdir():
        image.unlink()


def another_format(folder: Path) -> None:
    (official_files.gqa(folder) / "testdev_balanced_questions.json").write_text(json.dumps({"1": {"question": "?"}}))


def not_json(folder: Path) -> None:
    (official_files.gqa(folder) / "testdev_balanced_questions.json").write_text("{")


def no_balanced_question(folder: Path) -> None:
    (official_files.gqa(folder) / "testdev_balanced_questions.json").write_text("{}")


@pytest.mark.parametrize(
    ("prepare", "benchmarks", "images", "said"),
    [
        (break_nothing, ["gqb=DIR"], [], "gqa, vqav2, scienceqa, scienceqa_img, pope, mme, scenes"),
        (break_nothing, ["gqa"], [], "--benchmark gqa=PATH"),
        (break_nothing, ["gqa=DIR", "gqa=DIR"], [], "twice"),
        (break_nothing, ["scenes=DIR"], [], "write --benchmark scenes"),
        (break_nothing, ["gqa=DIR"], ["pope=DIR"], "add --benchmark pope=PATH"),
        (break_nothing, ["pope=DIR"], [], "coco_pope_random.json"),
        (break_nothing, ["mme=DIR"], [], "no subtask of MME"),
        (break_nothing, ["vqav2=DIR"], [], "v2_OpenEnded_mscoco_val2014_questions.json: no such file"),
        (lose_questions, ["gqa=DIR"], [], "testdev_balanced_questions.json: no such file"),
        (lose_images, ["gqa=DIR"], [], "none of its 3 images is there"),
        (another_format, ["gqa=DIR"], [], "question 1: no 'types'"),
        (not_json, ["gqa=DIR"], [], "Expecting property name"),
        (no_balanced_question, ["gqa=DIR"], [], "has no question"),
    ],
)
def test_refusals(
    prepare: Callable[[Path], None], benchmarks: list[str], images: list[str], said: str, tmp_path: Path
) -> None:
    prepare(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read_exams(*([word.replace("DIR", str(tmp_path)) for word in words] for words in (benchmarks, images)))
    assert said in str(caught.value)


Change = Callable[[Any], None]


def in_file(name: str, change: Change) -> Change:
    """Changes the JSON of the file ``name`` of a folder."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def put(*keys: Any) -> Change:
    """Sets the last of ``keys`` at the place that the others lead to."""
    *places, name, value = keys

    def change(content: Any) -> None:
        for place in places:
            content = content[place]
        content[name] = value

    return change


def drop(*keys: Any) -> Change:
    *places, name = keys

    def change(content: Any) -> None:
        for place in places:
            content = content[place]
        del content[name]

    return change


def again(*keys: Any) -> Change:
    """Repeats the first entry of a list."""

    def change(content: Any) -> None:
        for place in keys:
            content = content[place]
        content.append(content[0])

    return change


def replaced(name: str, old: str, new: str) -> Change:
    """Changes the text of the file ``name`` of a folder."""

    def apply(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return apply


GQA, FIRST = "testdev_balanced_questions.json", "201307251"
NOTES, ASKED = "v2_mscoco_val2014_annotations.json", "v2_OpenEnded_mscoco_val2014_questions.json"
POPE, OCR = "coco_pope_popular.json", "OCR/0001.txt"
MALFORMED: list[tuple[str, Change, str]] = [
    ("gqa", in_file(GQA, drop(FIRST, "answer")), f"question {FIRST}: no 'answer'"),
    ("gqa", in_file(GQA, put(FIRST, "answer", None)), f"question {FIRST}: answer is null, not text"),
    ("gqa", in_file(GQA, put(FIRST, "question", " ")), f'question {FIRST}: question is " ", not text'),
    ("gqa", in_file(GQA, put(FIRST, "question", "half of an emoji: \ud83d")), "surrogates not allowed"),
    ("gqa", in_file(GQA, put(FIRST, "types", "semantic", "colour")), 'semantic is "colour", none of attr, cat, global'),
    ("gqa", in_file(GQA, put(FIRST, "types", "structural", "ask")), 'structural is "ask", none of verify, query'),
    ("gqa", replaced(GQA, '"201640614"', f'"{FIRST}"'), f"{FIRST} is there twice"),
    ("vqav2", in_file(ASKED, again("questions")), "question 262148000 is there twice"),
    ("vqav2", in_file(ASKED, put("questions", 0, "image_id", "1")), 'question 262148000: image_id is "1", no number'),
    ("vqav2", in_file(ASKED, drop("questions", 0, "question")), "question 262148000: no 'question'"),
    ("vqav2", in_file(NOTES, again("annotations")), "question 393225001 is there twice"),
    ("vqav2", in_file(NOTES, drop("annotations", 0)), "question 393225001 has no annotation"),
    ("vqav2", in_file(NOTES, put("annotations", 0, "answer_type", "colour")), 'answer_type is "colour", none of yes/no'),
    ("vqav2", in_file(NOTES, put("annotations", 0, "image_id", 1)), "is about image 393225, its annotation about 1"),
    ("vqav2", in_file(NOTES, drop("annotations", 0, "answers", 0)), "question 393225001: has 9 answers, not 10"),
    ("scienceqa", in_file("pid_splits.json", again("test")), "problem 11 is there twice"),
    ("scienceqa", in_file("pid_splits.json", put("test", 0, "12")), "problem 12 of pid_splits.json is not there"),
    ("scienceqa", in_file("problems.json", put("22", "answer", 2)), "question 22: answer is 2, the number of none of"),
    ("scienceqa", in_file("problems.json", put("22", "answer", -1)), "question 22: answer is -1, the number of none of"),
    ("scienceqa", in_file("problems.json", put("22", "choices", list("uvwxyz"))), "has 6 choices, not 2 to 5 texts"),
    ("scienceqa", in_file("problems.json", put("22", "subject", "history")), 'subject is "history", none of natural'),
    ("scienceqa", in_file("problems.json", put("22", "grade", "7")), 'grade is "7", none of grade1'),
    ("scienceqa", in_file("problems.json", drop("22", "hint")), "question 22: no 'hint'"),
    ("scienceqa", replaced("problems.json", '"22":', '"11":'), "11 is there twice"),
    ("pope", replaced(POPE, '"label": "yes"', '"label": "Yes"'), 'question 1: label is "Yes", none of yes, no'),
    ("pope", replaced(POPE, '"label"', '"answer"'), "question 1: no 'label'"),
    ("pope", replaced(POPE, '"question_id": 2', '"question_id": 1'), "question 1 is there twice"),
    ("pope", replaced(POPE, '"question_id": 2', '"id": 2'), "no 'question_id'"),
    ("mme", replaced(OCR, "\tYes", "\tMaybe"), "not two lines of question, tab, Yes or No"),
    ("mme", replaced(OCR, "\tYes", "\tYes\tNo"), "not two lines of question, tab, Yes or No"),
    ("mme", replaced(OCR, "\tNo", ""), "not two lines of question, tab, Yes or No"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "change", "said"), MALFORMED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_malformed_file_is_refused_in_one_line(name: str, change: Change, said: str, tmp_path: Path) -> None:
    getattr(official_files, name)(tmp_path)
    change(tmp_path)
    with pytest.raises(ConfigError) as caught:
        read(name, tmp_path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_mme_image_with_one_question_is_refused(tmp_path: Path) -> None:
    (official_files.mme(tmp_path) / "OCR" / "0001.txt").write_text("Is it? Please answer yes or no.\tYes\n")
    with pytest.raises(ConfigError, match=r"0001\.txt.*two lines"):
        read("mme", tmp_path)
