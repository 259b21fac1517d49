"""VQA v2 (Goyal et al. 2017, arXiv 1612.00837): open questions about real images, each with ten people's answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sts.evaluate.benchmarks.question import (
    SHORT_ANSWER,
    Answer,
    Benchmark,
    Question,
    accuracy,
    official_file,
    read_json,
)
from megatron_sts.evaluate.metrics import Metrics
from megatron_sts.evaluate.vqa_text import normalise

QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"

_READING = re.compile(
    r"\b(says?|read|reads|written|spell(s|ed)?|words?|letters?|text|logo|brand|license plate|what number)\b",
    re.IGNORECASE,
)
"""VQA v2 does not mark questions about text in the image: these words in the question do."""


def read(source: Path, images: Path | None) -> list[Question]:
    """Questions of the folder ``source``: the official questions and annotations of val2014, and ``val2014/``.

    Raises:
        ConfigError: a file is missing or has another format, or a question has no annotation.
    """
    folder = images or source / "val2014"
    with official_file(source / QUESTIONS):
        content = read_json(source / QUESTIONS)
        subset, questions = content["data_subtype"], content["questions"]
        prompts = {entry["question_id"]: (entry["question"], entry["image_id"]) for entry in questions}
    with official_file(source / ANNOTATIONS):
        notes = {note["question_id"]: note for note in read_json(source / ANNOTATIONS)["annotations"]}
        return [
            _question(key, text, folder / f"COCO_{subset}_{image:012d}.jpg", notes[key])
            for key, (text, image) in prompts.items()
        ]


def _question(key: int, text: str, image: Path, note: dict[str, Any]) -> Question:
    return Question(
        key=str(key),
        prompt=text + SHORT_ANSWER,
        image=image,
        references=tuple(answer["answer"] for answer in note["answers"]),
        family=_family(text, note["question_type"], note["answer_type"]),
        groups={"answer_type": (note["answer_type"],), "question_type": (note["question_type"],)},
    )


def _family(text: str, question_type: str, answer_type: str) -> str:
    """counting: the official question types "how many ..."; ocr: words of reading; else the official answer type."""
    if question_type.startswith("how many"):
        return "counting"
    return "ocr" if _READING.search(text) else answer_type


def credit(answer: Answer) -> float:
    """The official accuracy, see ``vqa_accuracy``."""
    return vqa_accuracy(answer.text, answer.question.references)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The official accuracy: min(matches / 3, 1) among the other references, averaged over leaving each one out.

    All texts are normalised. ``vqaEval.py`` leaves them as they are where the references agree; there a normalised
    answer, which is what LLaVA submits, would never equal references like "two" or "t-shirt".
    """
    said = normalise(answer)
    hits = [normalise(reference) == said for reference in references]
    return sum(min((sum(hits) - hit) / 3, 1.0) for hit in hits) / len(hits)


def score(answers: Sequence[Answer]) -> Metrics:
    """Accuracy, also by answer type and by question type."""
    return accuracy(answers, credit)


VQAV2 = Benchmark(read, score, credit, headline="accuracy")
