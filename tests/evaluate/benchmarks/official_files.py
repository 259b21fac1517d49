"""Small benchmarks on disk, in the formats of the official releases: field by field as published, with made-up contents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (48, 32), (shade % 256, 90, 90)).save(path)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def gqa(folder: Path) -> Path:
    """testdev_balanced_questions.json: an object by question id; one question is not balanced."""
    rows = [
        ("201307251", "n161313", "Is it overcast?", "no", "verify", "global", "weatherVerify"),
        ("201640614", "n235859", "Who is wearing the dress?", "woman", "query", "rel", "relS"),
        ("202225914", "n336443", "What color is the shirt?", "blue", "query", "attr", "directOf"),
        ("20602949", "n336443", "Is the shirt red or blue?", "blue", "choose", "attr", "chooseAttr"),
        ("20602950", "n336443", "Is there a shirt?", "yes", "verify", "obj", "exist"),
    ]
    entries = {
        key: {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "scene"}],
            "entailed": [],
            "equivalent": [key],
            "question": question,
            "imageId": image,
            "isBalanced": key != "20602950",
            "groups": {"global": "", "local": "13-shirt"},
            "answer": answer,
            "semanticStr": "select: scene",
            "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
            "types": {"detailed": detailed, "semantic": semantic, "structural": structural},
            "fullAnswer": answer,
        }
        for key, image, question, answer, structural, semantic, detailed in rows
    }
    write_json(folder / "testdev_balanced_questions.json", entries)
    for _, image, *_ in rows:
        picture(folder / "images" / f"{image}.jpg")
    return folder


def vqav2(folder: Path, more: Sequence[tuple[int, int, str, str, str, list[str]]] = ()) -> Path:
    """v2_OpenEnded_mscoco_val2014_questions.json and v2_mscoco_val2014_annotations.json."""
    rows = [
        (262148000, 262148, "Where is he looking?", "none of the above", "other", ["down"] * 7 + ["at table"] * 3),
        (262148001, 262148, "How many people are there?", "how many people are", "number", ["2"] * 8 + ["two", "3"]),
        (393225000, 393225, "What does the sign say?", "what does the", "other", ["stop"] * 10),
        (393225001, 393225, "Is this a stop sign?", "is this a", "yes/no", ["yes"] * 10),
        *more,
    ]
    header = {"info": {"version": "2.0"}, "data_type": "mscoco", "data_subtype": "val2014", "license": {}}
    questions = [{"image_id": image, "question": text, "question_id": key} for key, image, text, *_ in rows]
    annotations = [
        {
            "question_type": question_type,
            "multiple_choice_answer": answers[0],
            "answers": [
                {"answer": answer, "answer_confidence": "yes", "answer_id": number}
                for number, answer in enumerate(answers, 1)
            ],
            "image_id": image,
            "answer_type": answer_type,
            "question_id": key,
        }
        for key, image, _, question_type, answer_type, answers in rows
    ]
    write_json(
        folder / "v2_OpenEnded_mscoco_val2014_questions.json",
        header | {"task_type": "Open-Ended", "questions": questions},
    )
    write_json(folder / "v2_mscoco_val2014_annotations.json", header | {"annotations": annotations[::-1]})
    for image in (262148, 393225):
        picture(folder / "val2014" / f"COCO_val2014_{image:012d}.jpg")
    return folder


def scienceqa(folder: Path) -> Path:
    """problems.json, pid_splits.json and images/test/ID/image.png."""

    def problem(question: str, choices: list[str], answer: int, subject: str, grade: int, **fields: Any) -> Any:
        return {
            "question": question, "choices": choices, "answer": answer, "hint": "", "image": None, "task": "closed choice",
            "grade": f"grade{grade}", "subject": subject, "topic": "us-history", "category": "Colonial America",
            "skill": "Identify the Thirteen Colonies", "lecture": "", "solution": "", "split": "test",
        } | fields  # fmt: skip

    pets = ["hard", "bendable"]
    problems = {
        "1": problem("Which is it?", ["a", "b"], 0, "social science", 2, split="train"),
        "11": problem("What is the colony?", ["Maryland", "Ohio", "Utah"], 1, "social science", 5, image="image.png"),
        "22": problem("Which word?", ["up", "down"], 0, "language science", 7, topic="word-study"),
        "33": problem("What do they share?", pets, 1, "natural science", 6, hint="Select the better answer.",
                      image="image.png", topic="physics"),
        "44": problem("Why?", ["so", "not so"], 0, "natural science", 12, hint="A text.", topic="physics"),
    }  # fmt: skip
    write_json(folder / "problems.json", problems)
    splits = {"train": ["1"], "val": [], "test": ["11", "22", "33", "44"]}
    write_json(folder / "pid_splits.json", splits)
    for key in ("11", "33"):
        picture(folder / "images" / "test" / key / "image.png")
    return folder


def pope(folder: Path, splits: tuple[str, ...] = ("random", "popular", "adversarial")) -> Path:
    """coco_pope_SPLIT.json: a JSON object a line."""
    image = "COCO_val2014_000000310196.jpg"
    rows = [("snowboard", "yes"), ("car", "no"), ("person", "yes"), ("dining table", "no")]
    lines = [
        json.dumps({"question_id": number, "image": image, "text": f"Is there a {thing} in the image?", "label": label})
        for number, (thing, label) in enumerate(rows, 1)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for split in splits:
        (folder / f"coco_pope_{split}.json").write_text("\n".join(lines) + "\n")
    picture(folder / "val2014" / image)
    return folder


def mme(folder: Path, subtasks: tuple[str, ...] = ("count", "OCR", "artwork", "code_reasoning")) -> Path:
    """A folder a subtask; artwork (as posters, celebrity, scene, landmark) has folders of texts and of images."""
    for subtask in subtasks:
        is_split = subtask in ("artwork", "posters", "celebrity", "scene", "landmark")
        texts = folder / subtask / "questions_answers_YN" if is_split else folder / subtask
        images = folder / subtask / "images" if is_split else folder / subtask
        texts.mkdir(parents=True, exist_ok=True)
        for number in (1, 2):
            text = (
                f"Is it {subtask} {number}? Please answer yes or no.\tYes\n"
                "Is it a picture  of nothing? Please answer yes or no.\tNo\n\n"
            )
            (texts / f"000{number}.txt").write_text(text, encoding="utf-8")
            picture(images / f"000{number}.{'png' if subtask == 'code_reasoning' else 'jpg'}")
    return folder
