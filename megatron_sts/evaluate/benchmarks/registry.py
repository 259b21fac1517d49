"""Which benchmarks there are, and which of them a command names. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sts.config.errors import refuse
from megatron_sts.evaluate.benchmarks.gqa import GQA
from megatron_sts.evaluate.benchmarks.mme import MME
from megatron_sts.evaluate.benchmarks.pope import POPE
from megatron_sts.evaluate.benchmarks.question import Benchmark, Question
from megatron_sts.evaluate.benchmarks.scenes import SCENES
from megatron_sts.evaluate.benchmarks.scienceqa import SCIENCEQA, SCIENCEQA_IMG
from megatron_sts.evaluate.benchmarks.vqav2 import VQAV2

BENCHMARKS: dict[str, Benchmark] = {
    "gqa": GQA,
    "vqav2": VQAV2,
    "scienceqa": SCIENCEQA,
    "scienceqa_img": SCIENCEQA_IMG,
    "pope": POPE,
    "mme": MME,
    "scenes": SCENES,
}


@dataclass(frozen=True)
class Exam:
    """A benchmark to ask, with its questions."""

    name: str
    benchmark: Benchmark
    questions: list[Question]
    """Those that can be asked: their image is there, or they have none."""
    num_left_out: int
    """Questions whose image is not there: no metric counts them."""
    missing: list[Path]
    """Those images."""


def read_exams(benchmarks: Sequence[str], images: Sequence[str]) -> list[Exam]:
    """The questions of each ``NAME=PATH`` (``scenes`` alone has no path) of ``benchmarks``; a ``NAME=DIR`` of ``images`` says where its images are.

    Raises:
        ConfigError: an unknown or repeated name, a missing or malformed file, or not one image is there.
    """
    sources, image_dirs = _paths("--benchmark", benchmarks), _paths("--images", images)
    for name in image_dirs.keys() - sources.keys():
        refuse("--images", f"{name}={image_dirs[name]}", "that benchmark is not asked", f"add --benchmark {name}=PATH")
    return [_read_exam(name, source, image_dirs.get(name)) for name, source in sources.items()]


def _paths(option: str, words: Sequence[str]) -> dict[str, Path]:
    paths: dict[str, Path] = {}
    for word in words:
        name, _, path = word.partition("=")
        if name not in BENCHMARKS:
            refuse(option, word, f"there is no benchmark {name!r}", f"choose from {', '.join(BENCHMARKS)}")
        if BENCHMARKS[name].has_files and not path:
            refuse(option, word, "no path", f"write {option} {name}=PATH")
        if path and not BENCHMARKS[name].has_files:
            refuse(option, word, "has no files", f"write --benchmark {name}")
        if name in paths:
            refuse(option, word, "given twice", "give it once")
        paths[name] = Path(path)
    return paths


def _read_exam(name: str, source: Path, images: Path | None) -> Exam:
    benchmark = BENCHMARKS[name]
    questions = benchmark.read(source, images)
    if not questions:
        refuse("--benchmark", f"{name}={source}", "has no question", "give the benchmark's official files")
    wanted = {question.image for question in questions if isinstance(question.image, Path)}
    missing = {image for image in wanted if not image.is_file()}
    if missing and len(missing) == len(wanted):
        why = f"none of its {len(wanted)} images is there ({min(missing)} ...)"
        refuse("--benchmark", f"{name}={source}", why, f"say where they are: --images {name}=DIR")
    asked = [question for question in questions if question.image not in missing]
    return Exam(name, benchmark, asked, len(questions) - len(asked), sorted(missing))
