"""Answers on disk as they come, so that an interrupted run asks only what is left. Knows no benchmark and no model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sts.config.errors import refuse
from megatron_sts.data.shards import write_atomically
from megatron_sts.evaluate.benchmarks.question import Answer, Question

SETTINGS_NAME = "model.json"
"""Whose answers a folder holds."""


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make ``folder`` the place for the answers that ``settings`` give; it may hold some already.

    Raises:
        ConfigError: it holds answers that other settings gave.
    """
    path, text = folder / SETTINGS_NAME, json.dumps(settings, indent=2) + "\n"
    if path.is_file():
        found, wanted = json.loads(path.read_text(encoding="utf-8")), json.loads(text)
        if differing := [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]:
            said = ", ".join(f"{name}={json.dumps(found.get(name))}" for name in differing)
            refuse("--out", folder, f"holds answers given with other settings ({said})",
                   "give another folder, or remove this one")  # fmt: skip
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


Said = tuple[str, str | None, str]
"""Prompt, picture and answer."""


class Journal:
    """The answers to one benchmark: a JSON object a line, with ``key``, ``prompt``, ``picture`` and ``answer``.

    Without a ``path`` they are kept in memory alone.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._answers = self._read()

    def answer(self, question: Question) -> Answer | None:
        """What was said to ``question``, if it was asked in these very words about this very picture."""
        prompt, picture, text = self._answers.get(question.key, (None, None, ""))
        return Answer(question, text) if (prompt, picture) == (question.prompt, question.picture) else None

    def add(self, answers: Sequence[Answer]) -> None:
        """Append ``answers``; they are on disk when this returns."""
        entries = [
            {
                "key": answer.question.key,
                "prompt": answer.question.prompt,
                "picture": answer.question.picture,
                "answer": answer.text,
            }
            for answer in answers
        ]
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
                file.flush()
                os.fsync(file.fileno())
        self._answers |= dict(map(_by_key, entries))

    def _read(self) -> dict[str, Said]:
        """All answers by key. What stands behind the last line's end was torn by a crash, and is cut off."""
        if self._path is None or not self._path.is_file():
            return {}
        content = self._path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        os.truncate(self._path, len(whole))
        lines = whole.decode("utf-8").split("\n")[:-1]
        return dict(self._parse(number, line) for number, line in enumerate(lines, 1))

    def _parse(self, number: int, line: str) -> tuple[str, Said]:
        try:
            return _by_key(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            why = f"line {number} is no answer ({type(error).__name__}: {error})"
            refuse("--out", self._path, why, "remove that line, or the file")


def _by_key(entry: Mapping[str, Any]) -> tuple[str, Said]:
    return entry["key"], (entry["prompt"], entry["picture"], entry["answer"])
