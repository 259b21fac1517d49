"""``megatron-sts eval`` on a trained run: the real command, model and answers; benchmarks in the official formats."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sts.commands.exams import Asked
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.load import CONFIG_NAME
from megatron_sts.evaluate.benchmarks.journal import claim
from megatron_sts.runtime.stored import INDEX
from tests.evaluate.benchmarks import official_files
from tests.evaluate.benchmarks.tiny_run import answers, megatron_sts, train

COMMAND = shlex.split("eval runs/tiny --benchmark pope=pope --benchmark mme=MME --images mme=MME --max-new-tokens 4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """runs/tiny: a run of one step; and two benchmarks."""
    folder = tmp_path_factory.mktemp("eval")
    train(folder)
    official_files.pope(folder / "pope")
    official_files.mme(folder / "MME")
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """Answers by benchmark, and the command's output."""
    done = megatron_sts(folder, *COMMAND)
    assert done.returncode == 0, done.stderr
    return {"stdout": done.stdout, **{name: answers(folder / "runs/tiny/eval", name) for name in ("pope", "mme")}}


def test_answers_scores_and_tables(folder: Path, found: dict[str, Any]) -> None:
    assert len(found["pope"]) == 12 and len(found["mme"]) == 16
    assert len(set(found["mme"].values())) > 1  # the model's own words, which follow the question
    [path] = (folder / "runs/tiny/eval").glob("*/mme.json")
    result = json.loads(path.read_text())
    assert result["num_questions"] == 16 and set(result["subtask"]) == {"count", "OCR", "artwork", "code_reasoning"}
    assert {"counting", "ocr"} <= set(result["family"])
    assert "adversarial" in found["stdout"] and str(path.relative_to(folder)) in found["stdout"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [[], ["parallel.tensor_model_parallel_size=2"], ["parallel.pipeline_model_parallel_size=2"]]
)
def test_two_ranks_say_the_same(folder: Path, found: dict[str, Any], layout: list[str], tmp_path: Path) -> None:
    done = megatron_sts(folder, *COMMAND, *layout, "--nproc", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert answers(tmp_path, "pope") == found["pope"] and answers(tmp_path, "mme") == found["mme"]


def test_goes_on_where_it_was(folder: Path, found: dict[str, Any], tmp_path: Path) -> None:
    """A planted first half shows that only the rest is asked."""
    [path] = (folder / "runs/tiny/eval").glob("*/pope.jsonl")
    planted = [json.loads(line) | {"answer": "planted"} for line in path.read_text().splitlines()[:6]]
    torn = json.dumps(planted[0])[:25]
    (tmp_path / "pope.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in planted) + torn)
    done = megatron_sts(folder, *COMMAND, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert answers(tmp_path, "pope") == found["pope"] | {entry["key"]: "planted" for entry in planted}


def test_a_damaged_picture_ends_it_in_one_line(folder: Path, tmp_path: Path) -> None:
    official_files.pope(tmp_path, ("random",))
    [picture] = (tmp_path / "val2014").iterdir()
    picture.write_bytes(picture.read_bytes()[:100])
    done = megatron_sts(folder, "eval", "runs/tiny", f"--benchmark=pope={tmp_path}", f"--out={tmp_path / 'out'}")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and picture.name in done.stderr


@pytest.mark.parametrize("change", ["weights", "order"])
def test_answers_of_other_weights_or_overrides_are_not_mixed_in(tmp_path: Path, change: str) -> None:
    for name in (CONFIG_NAME, INDEX, "model.safetensors"):
        (tmp_path / name).write_text("before")
    words = ["data.template=chat", "data.template=chatml"]
    asked = Asked(tmp_path, [*words, "parallel.tensor_model_parallel_size=2"], [], [], tmp_path / "out", 128)
    claim(asked.folder, asked.settings)
    claim(asked.folder, replace(asked, overrides=words).settings)
    if change == "weights":
        (tmp_path / "model.safetensors").write_text("behind")
    with pytest.raises(ConfigError, match="give another folder"):
        claim(asked.folder, replace(asked, overrides=words[:: -1 if change == "order" else 1]).settings)


@pytest.mark.parametrize("source", ["nowhere", "pope"])
def test_no_checkpoint_is_refused(folder: Path, source: str) -> None:
    done = megatron_sts(folder, "eval", source, "--benchmark", "pope=pope")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and source in done.stderr
