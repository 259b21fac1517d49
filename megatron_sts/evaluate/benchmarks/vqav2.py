"""VQA v2 (Goyal et al. 2017, arXiv 1612.00837): open questions about real images, each with ten people's answers."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sts.evaluate.benchmarks.question import (
    SHORT_ANSWER,
    Answer,
    Benchmark,
    Question,
    accuracy,
    check_once,
    entry_of,
    label,
    official_file,
    read_json,
    text,
)
from megatron_sts.evaluate.metrics import Metrics
from megatron_sts.evaluate.vqa_text import normalise

QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"

NUM_REFERENCES = 10
ANSWER_TYPES = ("yes/no", "number", "other")

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
        subset = text(content, "data_subtype")
        asked = _by_id(content["questions"])
        prompts = {key: (_words(key, entry), entry["image_id"]) for key, entry in asked.items()}
    with official_file(source / ANNOTATIONS):
        notes = _by_id(read_json(source / ANNOTATIONS)["annotations"])
        return [
            _question(key, words, folder / f"COCO_{subset}_{image:012d}.jpg", _note(key, image, notes))
            for key, (words, image) in prompts.items()
        ]


def _by_id(entries: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    check_once(f"question {entry['question_id']}" for entry in entries)
    return {entry["question_id"]: entry for entry in entries}


def _words(key: int, entry: dict[str, Any]) -> str:
    with entry_of(key):
        if not isinstance(entry["image_id"], int):
            raise ValueError(f"image_id is {json.dumps(entry['image_id'])}, no number")
        return text(entry, "question")


def _note(key: int, image: int, notes: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """The annotation of a question about that image."""
    if key not in notes:
        raise ValueError(f"question {key} has no annotation")
    if notes[key]["image_id"] != image:
        raise ValueError(f"question {key} is about image {image}, its annotation about {notes[key]['image_id']}")
    return notes[key]


def _question(key: int, words: str, image: Path, note: dict[str, Any]) -> Question:
    with entry_of(key):
        references = tuple(text(answer, "answer", may_be_blank=True) for answer in note["answers"])
        if len(references) != NUM_REFERENCES:
            raise ValueError(f"has {len(references)} answers, not {NUM_REFERENCES}")
        question_type, answer_type = text(note, "question_type"), label(note, "answer_type", ANSWER_TYPES)
        return Question(
            key=str(key),
            prompt=words + SHORT_ANSWER,
            image=image,
            references=references,
            family=_family(words, question_type, answer_type),
            groups={"answer_type": (answer_type,), "question_type": (question_type,)},
        )


def _family(words: str, question_type: str, answer_type: str) -> str:
    """counting: the official question types "how many ..."; ocr: words of reading; else the official answer type."""
    if question_type.startswith("how many"):
        return "counting"
    return "ocr" if _READING.search(words) else answer_type


def credit(answer: Answer) -> float:
    """The official accuracy, see ``vqa_accuracy``."""
    return vqa_accuracy(answer.text, answer.question.references)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """The official accuracy: min(matches / 3, 1) among the other references, averaged over leaving each one out.

    As in ``vqaEval.py``, texts are normalised unless all references are the same: then "2" is not "two". The answer is
    handed to it in lower case and without a full stop at the end, as LLaVA hands in GQA's; a capital would else cost
    every question whose references agree.
    """
    said, given = handed_in(answer), [_on_one_line(reference) for reference in references]
    if len(set(given)) > 1:
        said, given = normalise(said), [normalise(reference) for reference in given]
    hits = [reference == said for reference in given]
    return sum(min((sum(hits) - hit) / 3, 1.0) for hit in hits) / len(hits)


def handed_in(answer: str) -> str:
    """An answer as the official script gets it."""
    return _on_one_line(answer.rstrip(".").lower())


def _on_one_line(words: str) -> str:
    return words.replace("\n", " ").replace("\t", " ").strip()


def score(answers: Sequence[Answer]) -> Metrics:
    """Accuracy, also by answer type and by question type."""
    return accuracy(answers, credit)


VQAV2 = Benchmark(
    read, score, credit, headline="accuracy", is_read=lambda answer: bool(normalise(handed_in(answer.text)))
)
