"""The tables of ``megatron_sts/evaluate/README.md``: its official columns are what our rules find, its others what lmms-eval does.

The official columns were made by running the scripts that the README names, at those commits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import megatron_sts.evaluate
from megatron_sts.evaluate.benchmarks.gqa import handed_in
from megatron_sts.evaluate.benchmarks.mme import yes_or_no
from megatron_sts.evaluate.benchmarks.pope import says_yes
from megatron_sts.evaluate.benchmarks.scienceqa import LETTERS, letter_of
from megatron_sts.evaluate.benchmarks.vqav2 import vqa_accuracy
from megatron_sts.evaluate.vqa_text import normalise

NOTHING = "–"
LMMS_VERSION = "0.7.3"


def table(heading: str) -> list[list[str]]:
    """The cells of the table whose first row starts with ``heading``, without bold."""
    lines = (Path(megatron_sts.evaluate.__file__).parent / "README.md").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(heading))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().removeprefix("**").removesuffix("**") for cell in line.strip("|").split(" | ")])
    return rows


def said(cell: str) -> str:
    """The answer in a cell, as it is scored: the runner takes away blanks around it."""
    text: str = json.loads(cell.strip("`"))
    return text.strip()


def cell(found: str) -> str:
    return f"`{found}`" if found and found != NOTHING else NOTHING


OURS: list[Callable[[str], str]] = [
    lambda text: "yes" if says_yes(text) else "no",
    lambda text: yes_or_no(text).replace("other", ""),
    letter_of,
    handed_in,
    normalise,
]
READINGS = table("| answer | POPE")
CREDITS = table("| answer | references")


@pytest.mark.parametrize("row", READINGS, ids=lambda row: row[0])
def test_the_official_columns_are_what_we_find(row: list[str]) -> None:
    text = said(row[0])
    assert [cell(rule(text)) for rule in OURS] == row[1::2]


def references(words: str) -> list[str]:
    """The ten references of "9 `yes`, 1 `no`"."""
    return [word for number, word in re.findall(r"(\d+) `([^`]*)`", words) for _ in range(int(number))]


@pytest.mark.parametrize("row", CREDITS, ids=lambda row: f"{row[0]} of {row[1]}")
def test_vqa_v2s_column_is_our_credit(row: list[str]) -> None:
    given = references(row[1])
    assert len(given) == 10
    assert f"{vqa_accuracy(said(row[0]), given):.4g}" == row[3]


def test_both_tables_have_their_rows() -> None:
    assert len(READINGS) >= 35 and len(CREDITS) >= 15


class Lmms:
    """lmms-eval's rules, one label tried after the other."""

    def __init__(self) -> None:
        pytest.importorskip(
            "lmms_eval", reason="lmms-eval is not installed; bash tests/evaluate/lmms.sh runs this with it"
        )
        if version("lmms_eval") != LMMS_VERSION:
            pytest.skip(f"the table is of lmms-eval {LMMS_VERSION}")

    def pope(self, text: str) -> str:
        from lmms_eval.tasks.pope.utils import pope_process_results

        def credit(label: str) -> float:
            found = pope_process_results({"answer": label, "question_id": 1}, [text])
            return float(found["pope_accuracy"]["score"])

        return credited(("yes", "no"), credit)

    def mme(self, text: str) -> str:
        from lmms_eval.tasks.mme.utils import mme_process_results

        def credit(label: str) -> float:
            found = mme_process_results({"answer": label, "question_id": 1, "category": "OCR"}, [text])
            return float(found["mme_perception_score"]["score"])

        return credited(("yes", "no"), credit)

    def scienceqa(self, text: str) -> str:
        from lmms_eval.tasks.scienceqa.utils import sqa_process_results

        def credit(letter: str) -> float:
            doc = {"choices": list("vwxyz"), "answer": LETTERS.index(letter)}
            return float(sqa_process_results(doc, [text])["exact_match"])

        return credited(LETTERS, credit)

    def gqa(self, text: str, expected: str) -> bool:
        """Whether ``expected`` is what it compares: that very text is right."""
        from lmms_eval.api.metrics import exact_match_hf_evaluate

        found: Any = exact_match_hf_evaluate([text], [expected], ignore_case=True, ignore_punctuation=True)
        return bool(found["exact_match"] == 1)

    def vqav2(self, text: str, given: list[str]) -> float:
        from lmms_eval.tasks.vqav2.utils import vqav2_process_results

        answers = [{"answer": word, "answer_id": number} for number, word in enumerate(given)]
        return float(vqav2_process_results({"answers": answers, "question_id": 1}, [text])["exact_match"])


def credited(labels: tuple[str, ...] | str, credit: Callable[[str], float]) -> str:
    return next((label for label in labels if credit(label)), NOTHING)


def test_lmms_evals_columns() -> None:
    lmms = Lmms()
    for row in READINGS:
        text = said(row[0])
        assert [cell(rule(text)) for rule in (lmms.pope, lmms.mme, lmms.scienceqa)] == row[2:8:2], text
        compared, normalised = (word.strip("`").replace(NOTHING, "") for word in (row[8], row[10]))
        assert lmms.gqa(text, compared), text
        assert lmms.vqav2(text, [normalised] * 9 + ["another"]) == 1, text
    for row in CREDITS:
        assert f"{lmms.vqav2(said(row[0]), references(row[1])):.4g}" == row[4], row
