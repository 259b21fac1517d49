"""MME (Fu et al. 2023, arXiv 2306.13394): two yes/no questions an image, one of each, in fourteen subtasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_sts.config.errors import refuse
from megatron_sts.evaluate.benchmarks.question import (
    SHORT_ANSWER,
    Answer,
    Benchmark,
    Question,
    members_by_group,
    official_file,
)
from megatron_sts.evaluate.metrics import Metrics, average

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
FAMILIES = {"count": "counting", "OCR": "ocr"}
"""Subtasks that have another name elsewhere."""
_REPLACED_PROMPT = "Please answer yes or no."
_SUFFIXES = (".jpg", ".png", ".jpeg")


def read(source: Path, images: Path | None) -> list[Question]:
    """Questions of the folder ``source``, which holds a folder for each subtask.

    A subtask's texts (two lines ``question<TAB>Yes`` or ``No``) lie beside its images, or in ``questions_answers_YN/``
    with the images in ``images/``; both occur in the official release. ``images`` holds the subtasks' images if not there.

    Raises:
        ConfigError: no subtask is there, or a text has another format.
    """
    subtasks = [name for name in PERCEPTION + COGNITION if (source / name).is_dir()]
    if not subtasks:
        remedy = f"give the folder of {PERCEPTION[0]}/, OCR/ and the other subtasks"
        refuse("--benchmark", f"mme={source}", "no subtask of MME is there", remedy)
    return [question for name in subtasks for question in _read_subtask(name, source / name, (images or source) / name)]


def _read_subtask(subtask: str, folder: Path, images: Path) -> list[Question]:
    is_split = (folder / "questions_answers_YN").is_dir()
    texts, pictures = (folder / "questions_answers_YN", images / "images") if is_split else (folder, images)
    return [question for path in sorted(texts.glob("*.txt")) for question in _read_pair(subtask, path, pictures)]


def _read_pair(subtask: str, path: Path, images: Path) -> list[Question]:
    with official_file(path):
        rows = [line.strip().split("\t") for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        if [len(row) for row in rows] != [2, 2] or {row[1].lower() for row in rows} - {"yes", "no"}:
            raise ValueError("not two lines of question, tab, Yes or No")
    candidates = [images / f"{path.stem}{suffix}" for suffix in _SUFFIXES]
    image = next((candidate for candidate in candidates if candidate.is_file()), candidates[0])
    return [
        Question(
            key=f"{subtask}/{path.stem}/{place}",
            prompt=row[0].replace(_REPLACED_PROMPT, "").strip() + SHORT_ANSWER,
            image=image,
            references=(row[1].lower(),),
            family=FAMILIES.get(subtask, subtask),
            groups={"subtask": (subtask,), "image": (f"{subtask}/{path.stem}",)},
        )
        for place, row in enumerate(rows)
    ]


def yes_or_no(said: str) -> str:
    """As the official ``calculation.py``: by the first four letters; "other" without yes or no in them."""
    start = said.lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def credit(answer: Answer) -> float:
    """Whether yes or no is right."""
    return float(yes_or_no(answer.text) == answer.question.references[0])


def score(answers: Sequence[Answer]) -> Metrics:
    """Accuracy and accuracy+ (images with both questions right) of each subtask, and the official totals.

    A subtask's score is 100 (accuracy + accuracy+); ``perception`` and ``cognition`` are sums of scores, left out unless
    all of their subtasks were asked; ``total`` is the sum of the scores that there are.
    """
    subtasks = {name: _score_subtask(members) for name, members in members_by_group(answers, "subtask").items()}
    totals = {
        title: sum(subtasks[name]["score"] for name in names)
        for title, names in (("perception", PERCEPTION), ("cognition", COGNITION))
        if subtasks.keys() >= set(names)
    }
    total = sum(subtask["score"] for subtask in subtasks.values())
    return {**average(map(credit, answers)), "total": total, **totals, "subtask": subtasks}


def _score_subtask(answers: Sequence[Answer]) -> Metrics:
    found = average(map(credit, answers))
    pairs = average(float(all(map(credit, pair))) for pair in members_by_group(answers, "image").values())
    score = 100 * (found["accuracy"] + pairs["accuracy"])
    return {**found, "accuracy_plus": pairs["accuracy"], "num_images": pairs["num_questions"], "score": score}


MME = Benchmark(read, score, credit, headline="total", is_read=lambda answer: yes_or_no(answer.text) != "other")
