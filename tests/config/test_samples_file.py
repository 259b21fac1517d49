"""One reader for the JSON files that others made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.samples_file import read_entries

ENTRIES = [{"id": "a", "conversations": []}, {"id": "b\u2028\x85é", "conversations": []}]
LINES = [json.dumps(entry, ensure_ascii=False) for entry in ENTRIES]
MARK = "\ufeff"


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(ENTRIES),
        MARK + json.dumps(ENTRIES, indent=1),
        json.dumps({"data": ENTRIES}),
        MARK + json.dumps({"version": 1, "data": ENTRIES}, indent=2),
        "\n".join(LINES),
        MARK + "\n".join(LINES),
        "\r\n\r\n".join(["", *LINES, "  ", MARK]),
        f"{MARK}{LINES[0]}\n{MARK}{LINES[1]}\n",
    ],
)
@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_every_form_gives_the_same_entries(text: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert read_entries(tmp_path / name, "data.path") == ENTRIES


def test_broken_lines_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("\n".join([LINES[0], "{broken", "[" * 100_000, "3"]))
    assert read_entries(path, "data.path") == [ENTRIES[0], "{broken", "[" * 100_000, 3]
    path = path.rename(tmp_path / "x.JSONL")
    path.write_text("{broken\n" + LINES[0])
    assert read_entries(path, "data.path") == ["{broken", ENTRIES[0]]


@pytest.mark.parametrize("text", ["", " \n", MARK, "[]", '{"data": []}'])
def test_nothing_is_no_entry(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text, encoding="utf-8")
    assert read_entries(tmp_path / "x.json", "data.path") == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'[{"id": 1},', "not valid JSON (Expecting value: line 1 column 12"),
        (b'{"data": [\n{"id": 1}\n', "not valid JSON"),
        (b'{"annotations": [], "info": {}}', "an object with annotations, info, not samples"),
        (b'{"data": {}}', "an object with data, not samples"),
        (b"3", "3, not samples"),
        ("[]".encode("utf-16"), "not readable ("),
        (b"[" * 100_000, "not valid JSON (maximum recursion depth"),
    ],
)
def test_what_holds_no_samples_is_refused_in_one_line(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read_entries(tmp_path / "x.json", "data.path")
    message = str(error.value)
    assert message.startswith(f"data.path={tmp_path / 'x.json'}: {said}") and "\n" not in message
    assert message.endswith('give a list of samples, {"data": [...]}, or one sample a line, in UTF-8')
