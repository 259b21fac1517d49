"""Answers are kept as they come; a run that goes on asks only the rest, whatever a crash left behind."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from megatron_sts.config.errors import ConfigError
from megatron_sts.data.records import BadSampleError, Record
from megatron_sts.evaluate.benchmarks import tables
from megatron_sts.evaluate.benchmarks.journal import Journal, claim
from megatron_sts.evaluate.benchmarks.question import Answer, Question
from megatron_sts.evaluate.benchmarks.registry import read_exams
from megatron_sts.evaluate.benchmarks.runner import Ask, run_exams
from megatron_sts.evaluate.metrics import Metrics
from megatron_sts.runtime.dist import process_group
from tests.dist.launch import run_ranks
from tests.evaluate.benchmarks import official_files


class Parrot:
    """Says the same to everything, for as long as its patience lasts."""

    def __init__(self, text: str = " Yes\n", patience: int = 1000) -> None:
        self.text, self.patience = text, patience
        self.asked: list[list[str]] = []

    def __call__(self, records: Sequence[Record]) -> list[str]:
        if len(self.asked) == self.patience:
            raise KeyboardInterrupt
        self.asked.append([record.key for record in records])
        return [self.text] * len(records)


def run(folder: Path, ask: Ask, num_at_once: int = 5) -> Metrics:
    [exam] = read_exams([f"pope={folder}"], [])
    with process_group(60):
        [found] = run_exams([exam], ask, folder, num_at_once)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """POPE with 12 questions; answers go into the same folder."""
    return official_files.pope(tmp_path)


def test_every_question_is_asked_once_in_batches(folder: Path) -> None:
    parrot = Parrot()
    found = run(folder, parrot)
    assert [len(keys) for keys in parrot.asked] == [5, 5, 2]
    assert len({key for keys in parrot.asked for key in keys}) == 12
    assert found["yes_rate"] == 1.0 and found["accuracy"] == 0.5
    assert found["family"]["existence"]["num_questions"] == 12
    lines = [json.loads(line) for line in (folder / "pope.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and {line["answer"] for line in lines} == {"Yes"}
    assert lines[0]["key"] == "random/1" and lines[0]["prompt"].startswith("Is there a snowboard in the image?\n")


def test_an_interrupted_run_asks_only_the_rest(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(folder, Parrot(patience=1))
    parrot = Parrot()
    found = run(folder, parrot)
    assert [len(keys) for keys in parrot.asked] == [5, 2]
    assert found["num_questions"] == 12
    again = Parrot()
    assert run(folder, again) == found and not again.asked


@pytest.mark.parametrize("length", [1, 20, -1])
def test_a_torn_last_line_is_asked_again(folder: Path, length: int) -> None:
    run(folder, Parrot())
    path = folder / "pope.jsonl"
    *lines, last = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines) + last[:length])
    parrot = Parrot()
    run(folder, parrot)
    assert parrot.asked == [[json.loads(last)["key"]]]
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 12


def test_a_changed_question_is_asked_again(folder: Path) -> None:
    run(folder, Parrot())
    path = folder / "coco_pope_popular.json"
    path.write_text(path.read_text().replace("snowboard", "surfboard"))
    parrot = Parrot()
    assert run(folder, parrot)["num_questions"] == 12
    assert parrot.asked == [["popular/1"]]


@pytest.mark.parametrize("way", ["another folder", "changed in place"])
def test_a_changed_picture_is_asked_again(folder: Path, tmp_path: Path, way: str) -> None:
    run(folder, Parrot())
    pictures = folder / "val2014"
    if way == "another folder":
        pictures.rename(folder / "elsewhere")
        pictures.symlink_to("elsewhere")
    else:
        for path in pictures.iterdir():
            path.write_bytes(path.read_bytes() + b"\0")
    parrot = Parrot()
    assert run(folder, parrot)["num_questions"] == 12
    assert sum(map(len, parrot.asked)) == 12


def test_a_question_with_a_damaged_picture_is_left_out_with_its_reason(folder: Path) -> None:
    def ask(records: Sequence[Record]) -> list[str]:
        if any(record.key == "popular/2" for record in records):
            raise BadSampleError("half a picture")
        return ["Yes"] * len(records)

    found = run(folder, ask)
    assert found["num_questions"] == 11 and found["num_left_out"] == 1
    assert found["unusable"] == {"popular/2": "half a picture"}
    assert run(folder, Parrot())["num_questions"] == 12  # mended


def test_a_benchmark_of_damaged_pictures_is_refused(folder: Path) -> None:
    def ask(records: Sequence[Record]) -> list[str]:
        raise BadSampleError(f"half a picture in {records[0].key}")

    with pytest.raises(BadSampleError, match=r"pope: no question can be asked .*random/1"):
        run(folder, ask)


def test_a_damaged_line_is_refused(folder: Path) -> None:
    run(folder, Parrot())
    path = folder / "pope.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "{}\n", *lines[3:]]))
    with pytest.raises(ConfigError, match=r"pope\.jsonl: line 3 is no answer"):
        run(folder, Parrot())


def test_any_text_survives(tmp_path: Path) -> None:
    question = Question("1", "Welches Wort? 📷", None, ("",), "ocr")
    text = 'zwei\nZeilen\u2028"\\ \x00'
    Journal(tmp_path / "a.jsonl").add([Answer(question, text)])
    found = Journal(tmp_path / "a.jsonl").answer(question)
    assert found is not None and found.text == text


def test_answers_of_another_model_are_not_mixed_in(tmp_path: Path) -> None:
    claim(tmp_path / "out", {"checkpoint": "a", "max_new_tokens": 128})
    claim(tmp_path / "out", {"checkpoint": "a", "max_new_tokens": 128})
    with pytest.raises(ConfigError) as error:
        claim(tmp_path / "out", {"checkpoint": "b", "max_new_tokens": 128})
    assert str(error.value) == (
        f'--out={tmp_path / "out"}: holds answers given with other settings (checkpoint="a"); give another folder, or '
        "remove this one"
    )


def on_two_ranks() -> None:
    folder = Path(os.environ["FOLDER"])
    [exam] = read_exams([f"pope={folder}"], [])
    with process_group(60):
        parrot = Parrot()
        found = run_exams([exam], parrot, folder, 5)
    print(json.dumps({"asked": parrot.asked, "num_results": len(found)}))


def test_rank_zero_keeps_the_answers_and_says_what_is_asked(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(folder, Parrot(patience=1))
    first, second = (json.loads(output.splitlines()[-1]) for output in run_ranks(on_two_ranks, 2, 60, FOLDER=folder))
    assert first["asked"] == second["asked"] and [len(keys) for keys in first["asked"]] == [5, 2]
    assert (first["num_results"], second["num_results"]) == (1, 0)
    assert len((folder / "pope.jsonl").read_text().splitlines()) == 12


def on_two_nodes() -> None:
    folder = Path(os.environ["FOLDER"]) / os.environ["RANK"]
    with process_group(60), pytest.raises(ConfigError, match="what can be asked of gqa differs between ranks"):
        run_exams(read_exams([f"gqa={folder}"], []), Parrot(), folder, 5)


def test_nodes_with_other_images_are_refused(tmp_path: Path) -> None:
    official_files.gqa(tmp_path / "0")
    (official_files.gqa(tmp_path / "1") / "images" / "n161313.jpg").unlink()
    run_ranks(on_two_nodes, 2, 60, FOLDER=tmp_path)


def test_tables(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tables, "Console", lambda: Console(width=100))
    tables.print_tables([run(folder, Parrot())])
    printed = capsys.readouterr().out
    assert "not read" in printed
    assert "pope" in printed and "0.6667" in printed  # F1 of always yes with half of the references yes
    assert "existence" in printed and "0.500 (12)" in printed
    assert "adversarial" in printed and "0.500 ± 0.250 (4)" in printed
