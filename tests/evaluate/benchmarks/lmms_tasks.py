"""Tasks of lmms-eval, from its own YAML files, over local documents: in the fields of its data sets, made from official files."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sts.evaluate.benchmarks.question import Answer, Question
from megatron_sts.evaluate.benchmarks.registry import BENCHMARKS

Document = dict[str, Any]
"""A row of a data set of lmms-eval's, without its image."""


def pope(folder: Path) -> dict[str, Document]:
    found = {}
    for split in ("random", "popular", "adversarial"):
        for line in (folder / f"coco_pope_{split}.json").read_text().splitlines():
            entry = json.loads(line)
            number, image = str(entry["question_id"]), entry["image"].removesuffix(".jpg")
            row = {"id": number, "question_id": number, "question": entry["text"], "answer": entry["label"]}
            found[f"{split}/{number}"] = row | {"image_source": image, "category": split}
    return found


def mme(folder: Path) -> dict[str, Document]:
    found = {}
    for path in sorted(folder.glob("**/*.txt")):
        subtask = path.relative_to(folder).parts[0]
        for place, line in enumerate(filter(None, path.read_text().split("\n"))):
            question, answer = line.split("\t")
            row = {"question_id": f"{subtask}/{path.stem}.png", "question": question, "answer": answer}
            found[f"{subtask}/{path.stem}/{place}"] = row | {"category": subtask}
    return found


def scienceqa(folder: Path) -> dict[str, Document]:
    problems = json.loads((folder / "problems.json").read_text())
    fields = [
        "question",
        "choices",
        "answer",
        "hint",
        "task",
        "grade",
        "subject",
        "topic",
        "category",
        "skill",
        "lecture",
        "solution",
    ]
    return {key: {field: problems[key][field] for field in fields} for key in ("11", "22", "33", "44")}


def gqa(folder: Path) -> dict[str, Document]:
    entries = json.loads((folder / "testdev_balanced_questions.json").read_text())
    fields = ["imageId", "question", "answer", "fullAnswer", "isBalanced"]
    return {
        key: {"id": key} | {field: entry[field] for field in fields}
        for key, entry in entries.items()
        if entry["isBalanced"]
    }


def vqav2(folder: Path) -> dict[str, Document]:
    read = {kind: json.loads((folder / name).read_text())[kind] for kind, name in (
        ("questions", "v2_OpenEnded_mscoco_val2014_questions.json"),
        ("annotations", "v2_mscoco_val2014_annotations.json"))}  # fmt: skip
    texts = {str(entry["question_id"]): entry["question"] for entry in read["questions"]}
    return {key: note | {"question": texts[key]} for note in read["annotations"] for key in [str(note["question_id"])]}


@dataclass(frozen=True)
class Pair:
    """A task of lmms-eval and our benchmark, with the same documents."""

    task: Any
    questions: Sequence[Question]
    documents: Sequence[Document]
    """In the questions' order."""
    benchmark: str

    def theirs(self, answers: Sequence[str]) -> tuple[list[float], dict[str, float]]:
        """Each document's credit, and the scores; as lmms-eval's evaluator comes to them."""
        credits, values = [], {name: [] for name in self.task.aggregation()}
        for document, text in zip(self.documents, answers, strict=True):
            found = self.task.process_results(copy.deepcopy(document), [text])
            of_one = [value["score"] if isinstance(value, dict) else value for value in found.values()]
            assert len(set(of_one)) == 1
            credits.append(float(of_one[0]))
            for name, value in found.items():
                values[name].append(value)
        return credits, {name: float(self.task.aggregation()[name](value)) for name, value in values.items()}

    def ours(self, answers: Sequence[str]) -> tuple[list[float], dict[str, Any]]:
        """The same of ours; the runner takes away blanks around an answer."""
        rules, pairs = BENCHMARKS[self.benchmark], zip(self.questions, answers, strict=True)
        given = [Answer(question, text.strip()) for question, text in pairs]
        return [rules.credit(answer) for answer in given], rules.score(given)


def build_task(yaml: str, documents: Sequence[Document], images: Sequence[Path | None], folder: Path) -> Any:
    """The task of a YAML file of lmms-eval's, over local documents in place of its data set."""
    import datasets
    import lmms_eval.tasks
    from lmms_eval.api.task import ConfigurableTask
    from lmms_eval.utils import load_yaml_config

    config = load_yaml_config(str(Path(lmms_eval.tasks.__file__).parent / yaml))
    rows = datasets.Dataset.from_list(
        [row | {"image": str(image) if image else None} for row, image in zip(documents, images, strict=True)]
    )
    path = folder / f"{Path(yaml).stem}.parquet"
    rows.cast_column("image", datasets.Image()).to_parquet(str(path))
    config.pop("dataset_name", None)
    config.pop("process_docs", None)  # of GQA: fetches the images
    local = {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {config["test_split"]: str(path)}}}
    return ConfigurableTask(config=config | local)


def pair_of(name: str, yaml: str, source: Path, documents: dict[str, Document], folder: Path, part: str = "") -> Pair:
    """``part``: the questions whose key begins so."""
    questions = [question for question in BENCHMARKS[name].read(source, None) if question.key.startswith(part)]
    found = [documents[question.key] for question in questions]
    task = build_task(yaml, found, [question.image for question in questions], folder)
    return Pair(task, questions, list(task.test_docs()), name)
