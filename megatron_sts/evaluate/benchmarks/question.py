"""What every benchmark is made of: questions with their references, and the credit that an answer earns. Knows no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from megatron_sts.config.errors import refuse
from megatron_sts.data.image import decode_image
from megatron_sts.data.records import IMAGE_MARKER, ImageSource, Record, Turn
from megatron_sts.evaluate.metrics import Metrics, average

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
"""LLaVA-1.5's prompt for GQA, VQA v2, POPE and MME (its ``docs/Evaluation.md``)."""
LETTER_ANSWER = "\nAnswer with the option's letter from the given choices directly."
"""LLaVA-1.5's prompt for multiple choice."""


@dataclass(frozen=True)
class Question:
    """One question of a benchmark."""

    key: str
    """Unique in its benchmark, the same in every run."""
    prompt: str
    """What the user says, without the image."""
    image: Path | ImageSource | None
    references: tuple[str, ...]
    """What is right, in the benchmark's own words: one answer, or VQA v2's ten."""
    family: str
    """What it asks for, in words that benchmarks share: ``counting``, ``ocr`` ...; see megatron_sts/evaluate/README.md."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By kind of breakdown (``subject``), the groups that it counts in (``NAT``)."""

    after_image: str = "\n"
    """What stands between image and prompt: a new line, as in LLaVA."""

    @cached_property
    def picture(self) -> str | None:
        """Tells the image's file from another, or from what it was before: its path, size and time of change."""
        if not isinstance(self.image, Path):
            return None
        found = self.image.stat()
        return f"{self.image.resolve()} {found.st_size} {found.st_mtime_ns}"

    def record(self) -> Record:
        """The conversation that asks it; the image comes first."""
        if self.image is None:
            return Record(self.key, (Turn("user", self.prompt),))
        source = partial(decode_image, self.image) if isinstance(self.image, Path) else self.image
        return Record(self.key, (Turn("user", f"{IMAGE_MARKER}{self.after_image}{self.prompt}"),), (source,))


@dataclass(frozen=True)
class Answer:
    """A question and what the model said to it."""

    question: Question
    text: str


Credit = Callable[[Answer], float]
"""What an answer earns, from 0 to 1."""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: how its files are read and how its answers are scored."""

    read: Callable[[Path, Path | None], list[Question]]
    """From the folder of its official files, and that of its images where they lie elsewhere. Raises ConfigError."""
    score: Callable[[Sequence[Answer]], Metrics]
    credit: Credit
    headline: str
    """The metric of ``score`` that papers quote."""
    is_read: Callable[[Answer], bool]
    """Whether the rule finds an answer in what was said; what it does not find earns nothing, or what silence earns."""
    has_files: bool = True


def accuracy(answers: Sequence[Answer], credit: Credit) -> Metrics:
    """Mean credit over all, and apart for each group of each kind of breakdown."""
    kinds = dict.fromkeys(kind for answer in answers for kind in answer.question.groups)
    return {**average(map(credit, answers)), **{kind: by_group(answers, credit, kind) for kind in kinds}}


def by_group(answers: Sequence[Answer], credit: Credit, kind: str) -> dict[str, Metrics]:
    """Mean credit in each group of one kind of breakdown."""
    return {name: average(map(credit, members)) for name, members in members_by_group(answers, kind).items()}


def by_family(answers: Sequence[Answer], credit: Credit) -> dict[str, Metrics]:
    """Mean credit in each question family."""
    families = sorted({answer.question.family for answer in answers})
    return {name: average(credit(answer) for answer in answers if answer.question.family == name) for name in families}


def members_by_group(answers: Sequence[Answer], kind: str) -> dict[str, list[Answer]]:
    """The answers of each group of one kind of breakdown, by name."""
    members: dict[str, list[Answer]] = {}
    for answer in answers:
        for name in answer.question.groups[kind]:
            members.setdefault(name, []).append(answer)
    return dict(sorted(members.items()))


@contextmanager
def official_file(path: Path) -> Iterator[None]:
    """Within it, whatever a file lacks of its benchmark's format ends in one line.

    Raises:
        ConfigError: the file cannot be read, or has another format.
    """
    try:
        yield
    except FileNotFoundError:
        refuse("--benchmark", path, "no such file", "give the folder of the benchmark's official files")
    except OSError as error:
        refuse("--benchmark", path, error.strerror or str(error), "give a readable file")
    except _MALFORMED as error:
        why = f"not in the benchmark's official format ({_in_words(error)})"
        refuse("--benchmark", path, why, "give the file as it was published")


@contextmanager
def entry_of(key: object) -> Iterator[None]:
    """Within it, and within ``official_file``, what is wrong is said of the question ``key``."""
    try:
        yield
    except _MALFORMED as error:
        raise ValueError(f"question {key}: {_in_words(error)}") from error


_MALFORMED = (KeyError, TypeError, AttributeError, IndexError, ValueError)


def _in_words(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error)


def read_json(path: Path) -> Any:
    """A JSON file's value; within ``official_file``."""
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(content: str) -> Any:
    """As ``json.loads``, but no object may have a key twice, of which Python would drop the first, and all text is Unicode."""
    value = json.loads(content, object_pairs_hook=_once)
    if "\\u" in content:  # may spell half of a surrogate pair, which tokenizers and journals cannot take
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        check_once(key for key, _ in pairs)
    return found


def check_once(keys: Iterable[object]) -> None:
    """Refuses, within ``official_file``, a key that is there twice: either would hide the other's answer."""
    seen: set[object] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"{key} is there twice")
        seen.add(key)


def text(entry: Mapping[str, Any], field: str, *, may_be_blank: bool = False) -> str:
    """The words in a field; within ``official_file``."""
    value = entry[field]
    if not isinstance(value, str) or not (value.strip() or may_be_blank):
        raise ValueError(f"{field} is {json.dumps(value)}, not text")
    return value


def label(entry: Mapping[str, Any], field: str, labels: Collection[str]) -> str:
    """One of the words that a field may hold; within ``official_file``."""
    if (value := entry[field]) not in labels:
        raise ValueError(f"{field} is {json.dumps(value)}, none of {', '.join(labels)}")
    return str(value)
