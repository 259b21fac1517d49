"""What pydantic refused of a user's values, in one line: field, value, what it should be. Torch-free; knows no file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from megatron_sts.config.nearest import nearest
from megatron_sts.config.section import Section, section_of

NULL_REMEDIES = {"evaluation": "evaluation.num_questions=0 does without it"}
"""What is meant by null where a group of keys has to be."""
ASKED = "Input should be "
"""How most of pydantic's messages begin."""
WORDS = {
    "a valid boolean": "true or false",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "text",
    "a valid tuple": "a list",
    "a valid dictionary": "a group of keys",
}
"""pydantic's for ours; what it adds of parsing is left out."""


def explain(error: ValidationError, values: Any, schema: type[Section], groups: str = "give its keys") -> str:
    """The first thing that is wrong with ``values``, which are no ``schema``: where a value may be of several types, what each asks for.

    ``groups``: what to do where a group of keys has to be; ``{field}`` in it is replaced.
    """
    # A misspelt key comes first: it is why another one is missing.
    errors = sorted(error.errors(), key=lambda entry: entry["type"] != "extra_forbidden")
    first = _nearest_to_meant(errors, values)
    value, message = first["input"], first["msg"]
    field = _dotted(first, values)
    if first["type"] == "missing":
        return f"{field}: missing; add it"
    if first["type"] == "value_error":
        message = message.removeprefix("Value error, ")
        return f"{field}: {message}" if field else message
    if first["type"] == "extra_forbidden":
        remedy = (len(first["loc"]) == 1 and _elsewhere(field, value, values)) or _nearest(first["loc"], schema)
        return f"{field}={_short(value)}: unknown key; {remedy}"
    if message.startswith(ASKED):
        here = [other for other in errors if _dotted(other, values) == field]
        message = f"it should be {' or '.join(dict.fromkeys(_asked(other) for other in here))}"
    if first["type"] == "model_type":
        message += "; " + NULL_REMEDIES.get(field if value is None else "", groups.format(field=field))
    message = re.sub(r"^\w+ should have", "it should have", message)
    return one_line(f"{field}={_short(value)}: {message}" if field else f"{_short(value)}: {message}")


def _nearest_to_meant(errors: Sequence[ErrorDetails], values: Any) -> ErrorDetails:
    """The first error; of a value that may be of several types, that of the type which it is like: it lies deepest in the value."""
    field = _dotted(errors[0], values)
    here = [error for error in errors if f"{_dotted(error, values)}.".startswith(f"{field}.")]
    return max(here, key=lambda error: _dotted(error, values).count("."))


def _asked(error: ErrorDetails) -> str:
    """What a value should be."""
    asked = error["msg"].removeprefix(ASKED)
    asked = re.sub(r"a valid dictionary or instance of \w+", "a group of keys", asked)
    return next((ours for theirs, ours in WORDS.items() if asked.startswith(theirs)), asked)


def _dotted(error: ErrorDetails, values: Any) -> str:
    """Where it is, as the user would write it in an override: stages by name, without pydantic's names of the types that a value
    may be of."""
    pieces, node, location = [], values, error["loc"]
    for place, piece in enumerate(location):
        is_missing = error["type"] == "missing" and place + 1 == len(location)
        if isinstance(node, Mapping) and (piece in node or is_missing):
            node = node.get(piece)
        elif isinstance(node, (list, tuple)) and isinstance(piece, int):
            node = node[piece] if piece < len(node) else None
        else:
            continue
        pieces.append(str(piece))
    if len(pieces) > 1 and pieces[0] == "stages":
        stage = values["stages"][location[1]]
        pieces[1] = str(stage.get("name", pieces[1])) if isinstance(stage, Mapping) else pieces[1]
    return ".".join(pieces)


def _nearest(location: Sequence[str | int], schema: type[Section]) -> str:
    """What to write instead of an unknown key."""
    section = schema
    for key in location[:-1]:
        if key in section.model_fields:  # else an index, or a key of the user's own
            section = section_of(section.model_fields[key].annotation) or section
    known = list(section.model_fields)
    near = nearest(str(location[-1]), known)
    return f"did you mean {near}?" if near else f"remove it, or choose from {', '.join(known)}"


def _elsewhere(name: str, value: object, values: Any) -> str | None:
    """A key of some section, or of a stage, that was written without what stands before it."""
    from megatron_sts.config.describe import keys  # which imports the schema

    if isinstance(value, Mapping) and name in _stage_names(values):
        return f"did you mean {'.'.join(['stages', name, *_way_down(value)])}?"
    below = next(iter(value), None) if isinstance(value, Mapping) else None
    ending = f".{name}" if below is None else f".{name}.{below}"
    found = next((key.name for key in keys() if key.name.endswith(ending)), None)
    return found and f"did you mean {found}?"


def _stage_names(values: Any) -> list[object]:
    """Of the stages of a config that need not be one."""
    stages = values.get("stages") if isinstance(values, Mapping) else None
    if not isinstance(stages, (list, tuple)):
        return []
    return [stage.get("name") for stage in stages if isinstance(stage, Mapping)]


def _way_down(node: object) -> Iterator[str]:
    """The keys to the first value that is no group of keys."""
    while isinstance(node, Mapping) and node:
        key, node = next(iter(node.items()))
        yield str(key)


def _short(value: object) -> str:
    """A value for an error line."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else one_line(value)
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(value: object) -> str:
    """Its text, however many lines that has."""
    return " ".join(str(value).split())
