"""What a card may say, and how it reads."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sts.cards.card import FILE, Card, Figure, Status, read_card, write_card
from megatron_sts.cards.head import figure_in_words, needs_in_words, readme_head
from megatron_sts.config.errors import ConfigError

FACTS: dict[str, Any] = {
    "title": "One, 8 GPUs",
    "purpose": "showing",
    "command": "megatron-sts plan examples/one",
    "needs": {
        "devices": 8,
        "device": "H100 GPU",
        "memory_gib": 50.32,
        "hours": {"value": 4.171, "tolerance": 0.42},
        "step_s": {"finetune": {"value": 2.536, "tolerance": 0.25}},
    },
    "evidence": [
        {
            "status": "planned only",
            "date": "2026-11-29",
            "commit": "375bc30",
            "results": [{"what": "share", "value": 0.5, "tolerance": 0.01}],
        },
        {
            "status": "measured on one H200",
            "of": "half of it",
            "date": "2026-11-26",
            "commit": "eb76ff8",
            "results": [{"what": "step", "value": 12, "tolerance": 0, "unit": "ms"}],
        },
    ],
}
HEAD = """# One, 8 GPUs

<!-- card -->
| | |
|---|---|
| needs | 8 H100 GPUs, 50.3 GiB of each, 4.17 ± 0.42 h |
| a step | finetune 2.54 ± 0.25 s |
| status | planned only (2026-11-29, 375bc30) |
| expected | share: 0.50 ± 0.01 |
| status | measured on one H200 (2026-11-26, eb76ff8): half of it |
| expected | step: 12 ms, exactly |

```bash
megatron-sts plan examples/one
```
<!-- /card -->
"""


def write(folder: Path, facts: dict[str, Any]) -> Path:
    (folder / FILE).write_text(yaml.safe_dump(facts))
    return folder


def test_a_card_is_what_was_written(tmp_path: Path) -> None:
    card = read_card(write(tmp_path, FACTS))
    assert card.status is Status.PLANNED and card.result("step").value == 12
    assert readme_head(card) == HEAD
    write_card(card, tmp_path)
    assert read_card(tmp_path) == card
    with pytest.raises(KeyError):
        card.result("nothing")


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        (("status",), "measured", "evidence.0.status=measured: it should be 'measured on CPU'"),
        (("commit",), "HEAD", "evidence.0.commit=HEAD"),
        (("date",), "yesterday", "evidence.0.date=yesterday"),
        (("results",), [], r"evidence.0.results=\[\]"),
        (("results", 0, "tolerance"), -1, "evidence.0.results.0.tolerance=-1"),
        (("results", 0, "tolerence"), 1, "evidence.0.results.0.tolerence=1: unknown key; did you mean tolerance"),
    ],
    ids=str,
)
def test_refused_in_one_line(tmp_path: Path, where: tuple[Any, ...], value: object, said: str) -> None:
    facts = copy.deepcopy(FACTS)
    inner = facts["evidence"][0]
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    with pytest.raises(ConfigError, match=rf"{FILE}: {said}") as error:
        read_card(write(tmp_path, facts))
    assert "\n" not in str(error.value)


def test_a_result_says_its_tolerance() -> None:
    facts = copy.deepcopy(FACTS)
    del facts["evidence"][0]["results"][0]["tolerance"]
    with pytest.raises(ValueError, match=r"results\.0\.tolerance"):
        Card.model_validate(facts)


def test_no_card_and_no_yaml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no card\.yaml"):
        read_card(tmp_path)
    (tmp_path / FILE).write_text("title: [")
    with pytest.raises(ConfigError, match=r"card\.yaml: no YAML") as error:
        read_card(tmp_path)
    assert "\n" not in str(error.value)


def test_tolerances() -> None:
    assert Figure(value=2.0, tolerance=0.1).admits(2.1) and not Figure(value=2.0, tolerance=0.1).admits(2.11)
    assert Figure(value=3, tolerance=0).admits(3) and not Figure(value=3, tolerance=0).admits(3.001)
    assert Figure(value=2.0).admits(100.0)


@pytest.mark.parametrize(
    ("value", "tolerance", "said"),
    [
        (1247, 60, "1247 ± 60"),
        (0.8417, 0.084, "0.842 ± 0.084"),
        (0.6923, 0.0005, "0.6923 ± 0.0005"),
        (0.83, 0.0996, "0.8 ± 0.1"),
        (4.171, None, "4.17"),
        (3, 0, "3"),
    ],
)
def test_numbers_are_told_as_far_as_they_are_known(value: float, tolerance: float | None, said: str) -> None:
    assert figure_in_words(Figure(value=value, tolerance=tolerance)) == said


@pytest.mark.parametrize(("hours", "said"), [(1.217, "1.22 h"), (0.1333, "8 min"), (0.0022, "7.92 s")])
def test_durations(hours: float, said: str) -> None:
    facts = {**FACTS["needs"], "devices": 1, "device": "CPU core", "memory_gib": None, "hours": {"value": hours}}
    needs = Card.model_validate({**FACTS, "needs": facts}).needs
    assert needs_in_words(needs) == f"1 CPU core, memory not known, {said}"
