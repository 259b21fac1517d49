"""``megatron-sts config`` knows every key, as pydantic's own JSON Schema has them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sts.cli import main
from megatron_sts.config.describe import find, keys
from megatron_sts.config.errors import ConfigError
from megatron_sts.config.schema import RunConfig

SCHEMA = RunConfig.model_json_schema()


def walk(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Dotted names and their schemas."""
    for name, schema in section["properties"].items():
        yield prefix + name, schema
        kinds = [schema, *schema.get("anyOf", []), schema.get("items", {})]
        for kind in kinds:
            if (reference := kind.get("$ref")) is not None:
                listed = "*." if kind is schema.get("items") else ""
                yield from walk(SCHEMA["$defs"][reference.rsplit("/", 1)[1]], f"{prefix}{name}.{listed}")


def test_every_key_is_known_with_its_meaning_choices_and_default() -> None:
    known, schemas = {key.name: key for key in keys()}, dict(walk(SCHEMA, ""))
    assert list(known) == list(schemas) and len(known) > 150
    for name, key in known.items():
        schema = schemas[name]
        assert key.meaning, f"{name} has no docstring"
        assert (key.default is None) == ("default" not in schema), name
        for choice in schema.get("enum", []):
            assert choice in key.values.split(" | "), name
        if isinstance(default := schema.get("default"), str | int | float):  # bool is an int
            read = key.default if isinstance(default, str) else type(default)(yaml.safe_load(str(key.default)))
            assert read == default, name


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("parallel.layout", ["parallel.layout"]),
        ("stages.finetune.lds.alpha", ["stages.*.lds.alpha"]),
        ("stages.1.lds.alpha", ["stages.*.lds.alpha"]),
        ("stages.lds.alpha", ["stages.*.lds.alpha"]),
        ("lds.alpha", ["stages.*.lds.alpha"]),
        ("alpha", ["stages.*.lds.alpha"]),
        ("model.projector", ["model.projector", "model.projector.type", "model.projector.init"]),
        ("keep_last", ["checkpoint.keep_last"]),
    ],
)
def test_a_key_is_found_by_its_name_or_its_end(asked: str, found: list[str]) -> None:
    assert [key.name for key in find(asked)] == found


def test_a_section_of_a_list_shows_its_keys() -> None:
    names = [key.name for key in find("stages")]
    assert names[:3] == ["stages", "stages.*.name", "stages.*.freeze"] and "stages.*.lds.alpha" not in names


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [
        ("stages.a.lds.alhpa", "did you mean stages.*.lds.alpha?"),
        ("paralel", "did you mean parallel?"),
        (
            "parallel.contxt",
            "did you mean parallel.context_parallel_size?",
        ),  # by its letters alone: model.projector.type
        ("stages.0.lsd.alpha", "did you mean stages.*.lds.alpha?"),
        ("vision.patch", "did you mean model.vision.patch_size?"),
        ("paralell.keep_lst", "did you mean checkpoint.keep_last?"),
        ("parallel.tp", "megatron-sts config parallel lists what there is"),
        ("stages.finetune.qqq", "megatron-sts config stages lists what there is"),
        ("foo.qqq", "megatron-sts config lists all"),
    ],
)
def test_a_misspelt_key_is_named(asked: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as error:
        find(asked)
    assert str(error.value) == f"config {asked}: no such key; {remedy}"


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "lds.alpha"]) == 0
    text = capsys.readouterr().out
    assert "stages.*.lds.alpha  number >= 0, <= 1; default 0.5" in text and "Skip probability" in text
    assert main(["config", "lds.alpha", "--json"]) == 0
    [key] = json.loads(capsys.readouterr().out)
    assert (key["name"], key["default"], key["is_section"]) == ("stages.*.lds.alpha", "0.5", False)
    assert main(["config"]) == 0
    assert "checkpoint.keep_last  whole number > 0; default 2" in capsys.readouterr().out.splitlines()
    assert main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
    assert main(["config", "alpha", "--schema"]) == 2
    assert "--schema: takes neither KEY" in capsys.readouterr().err


@pytest.mark.parametrize("room", ["lds", "vtc"])
def test_the_page_of_a_room_names_every_choice(room: str) -> None:
    page = (Path(__file__).parents[2] / "megatron_sts" / room / "README.md").read_text()
    of_room = [key for key in keys() if key.name.startswith(f"stages.*.{room}.")]
    choices = {choice for key in of_room if " | " in key.values for choice in key.values.split(" | ")}
    assert "uniform" in choices or "bernoulli" in choices
    assert {choice for choice in choices if f"`{choice}`" not in page} == set()
