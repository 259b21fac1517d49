"""What an example's ``card.yaml`` may say: what it needs, what it gives, and how anybody knows."""

from __future__ import annotations

import math
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.explain import explain, one_line
from megatron_sts.config.section import PositiveInt, Section

FILE = "card.yaml"
Positive = Annotated[float, Field(gt=0.0)]
Text = Annotated[str, Field(min_length=1)]


class Status(StrEnum):
    """How numbers came about."""

    CPU = "measured on CPU"
    H200 = "measured on one H200"
    PLANNED = "planned only"


class Figure(Section):
    """A number, and how far off another run of the same may be."""

    value: float
    tolerance: Annotated[float, Field(ge=0.0)] | None = None
    """In the unit of the value, either way; 0: exact. None: measured once, and it is not known how far others are off."""

    def admits(self, found: float) -> bool:
        """Whether a number that was found lies within the tolerance; without one, whatever it is."""
        if self.tolerance is None:
            return True
        return math.isclose(found, self.value, rel_tol=1e-9, abs_tol=self.tolerance * (1 + 1e-9))


class Result(Figure):
    """What a run is to come to."""

    what: Text
    unit: str = ""
    tolerance: Annotated[float, Field(ge=0.0)]
    source: str | None = None
    """Where the number is kept: a file's path in the repository, ``#``, and where in it. Without: a test runs or plans it again."""


class Needs(Section):
    """What the example takes, as its first evidence has it."""

    devices: PositiveInt
    device: Text
    """In the singular: ``CPU core``."""
    memory_gib: Positive | None
    """Of the device or rank that needs most, at its peak. None: not known."""
    hours: Figure
    """From the command to its end; of what is planned: steps alone."""
    step_s: Annotated[dict[str, Figure], Field(min_length=1)]
    """Seconds a step by stage, in the mean."""


class Evidence(Section):
    """Results that were found together."""

    status: Status
    of: str | None = None
    """What was measured, where it is not the example as it stands."""
    date: date
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{7,40}$")]
    """Of the code that was run, or that planned it."""
    results: Annotated[tuple[Result, ...], Field(min_length=1)]


class Card(Section):
    """One example."""

    title: Text
    """The README's first line."""
    purpose: Text
    command: Text
    """That gives the first evidence."""
    needs: Needs
    evidence: Annotated[tuple[Evidence, ...], Field(min_length=1)]
    """That of the example as it stands comes first."""

    @property
    def status(self) -> Status:
        """Of the example as it stands."""
        return self.evidence[0].status

    def result(self, what: str) -> Result:
        """The result of that name.

        Raises:
            KeyError: there is none.
        """
        for evidence in self.evidence:
            for result in evidence.results:
                if result.what == what:
                    return result
        raise KeyError(what)


def read_card(folder: Path) -> Card:
    """The card of an example's folder.

    Raises:
        ConfigError: it has none, or one that says what no card may.
    """
    path = folder / FILE
    if not path.is_file():
        raise ConfigError(f"{folder}: holds no {FILE}; give an example's folder")
    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Card.model_validate(written)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: no YAML: {one_line(error)}") from None
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, written, Card)}") from None


def write_card(card: Card, folder: Path) -> None:
    """What ``read_card`` reads, without what is as by default."""
    facts = card.model_dump(mode="json", exclude_unset=True)
    for evidence in facts["evidence"]:
        evidence["results"] = [{"what": result.pop("what"), **result} for result in evidence["results"]]
    text = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True, width=300, default_flow_style=None)
    (folder / FILE).write_text(text, encoding="utf-8")
