"""The entries of a JSON file of samples, for counting, for training and for ``data prepare``. Torch-free; knows no entry's form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sts.config.errors import refuse
from megatron_sts.config.siblings import named_alike

LINES_SUFFIXES = (".jsonl", ".ndjson")
BYTE_ORDER_MARK = "\ufeff"
"""Windows' editors put it in front; files that were joined have more of them, at the starts of lines."""
REMEDY = 'give a list of samples, {"data": [...]}, or one sample a line, in UTF-8'


def read_entries(path: Path, field: str) -> list[Any]:
    """The entries of a JSON list, of ``{"data": [...]}``, or of JSON lines; a line that is no JSON stays text.

    Blank lines and byte order marks are no entries. JSON lines are known by their name, or by a first line that is whole.

    Args:
        path: the file.
        field: what names it in a refusal.

    Raises:
        ConfigError: it cannot be read, or holds something else.
    """
    try:
        text = path.read_text(encoding="utf-8").removeprefix(BYTE_ORDER_MARK)
    except OSError as error:
        refuse(field, path, f"not readable ({error.strerror}{named_alike(path)})", REMEDY)
    except UnicodeDecodeError as error:
        refuse(field, path, f"not readable ({error})", REMEDY)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = [line for line in text.split("\n") if line.strip(BYTE_ORDER_MARK + " \t\r")]
        if path.suffix.lower() in LINES_SUFFIXES or not lines or not isinstance(_line(lines[0]), str):
            return [_line(line) for line in lines]
        refuse(field, path, f"not valid JSON ({error})", REMEDY)
    return _entries(value, path, field)


def _entries(value: Any, path: Path, field: str) -> list[Any]:
    if isinstance(value, list):
        return value
    if isinstance(value, dict) and "conversations" in value:
        return [value]  # JSON lines with one line
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        data: list[Any] = value["data"]
        return data
    found = f"an object with {', '.join(value)[:60] or 'nothing'}" if isinstance(value, dict) else repr(value)[:60]
    refuse(field, path, f"{found}, not samples", REMEDY)


def _line(line: str) -> Any:
    try:
        return json.loads(line.removeprefix(BYTE_ORDER_MARK))
    except (ValueError, RecursionError):
        return line
