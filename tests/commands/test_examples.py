"""``megatron-sts examples`` lists what the cards say, and says in one line where there are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import megatron_sts
from megatron_sts.cards.shelf import examples_folder
from megatron_sts.cli import main
from tests.examples.test_cards import WITHOUT

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = {path.parent.name for path in EXAMPLES.glob("*/README.md")} - WITHOUT


def test_list(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them; commands whole, also where the terminal is narrow."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["examples"]) == 0
    text = capsys.readouterr().out
    assert len(NAMES) >= 15 and all(f"│ {name} " in text for name in NAMES)
    commands = [line.split(maxsplit=1) for line in text.splitlines() if "megatron-sts plan" in line]
    assert ["llava15_7b", "megatron-sts plan examples/llava15_7b --hardware h100"] in commands
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["examples"]) == 0
    text = capsys.readouterr().out
    assert all(
        f" {status} " in text
        for status in ("planned only", "measured on CPU", "planned only; in part measured on one H200")
    )


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["examples", "--json"]) == 0
    found = {card["name"]: card for card in json.loads(capsys.readouterr().out)["examples"]}
    assert found.keys() == NAMES
    assert found["quickstart"]["evidence"][0]["status"] == "measured on CPU"


@pytest.mark.parametrize("name", ["llava15_7b", "examples/llava15_7b/"])
def test_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["examples", name]) == 0
    text = capsys.readouterr().out
    assert text.startswith("LLaVA-1.5-7B, 8 GPUs\n") and "8 H100 GPUs" in text
    assert text.endswith("megatron-sts plan examples/llava15_7b --hardware h100\n")
    assert main(["examples", name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "llava15_7b"


def test_an_unknown_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["examples", "llava16"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("megatron-sts: error: NAME=llava16: no such example; take one of adopt_megatron_core, ")
    assert told.count("\n") == 1


def test_installed_without_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As from a wheel: those of a clone in which it is started, else one line."""
    monkeypatch.setattr(megatron_sts, "__file__", str(tmp_path / "site-packages" / "megatron_sts" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    assert main(["examples"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("megatron-sts: error: examples: neither beside the package") and told.count("\n") == 1
    monkeypatch.chdir(EXAMPLES.parent)
    assert examples_folder() == EXAMPLES
