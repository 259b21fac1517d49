"""What pydantic refused of a user's values, in one line: field, value, what it should be. Torch-free; knows no file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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
    first = errors[0]
    value, message = first["input"], first["msg"]
    field = _dotted(first["loc"], values)
    if first["type"] == "missing":
        return f"{field}: missing; add it"
    if first["type"] == "value_error":
        message = message.removeprefix("Value error, ")
        return f"{field}: {message}" if field else message
    if first["type"] == "extra_forbidden":
        return f"{field}={_short(value)}: unknown key; {_nearest(first['loc'], schema)}"
    if message.startswith(ASKED):
        here = [other for other in errors if _dotted(other["loc"], values) == field]
        message = f"it should be {' or '.join(dict.fromkeys(_asked(other) for other in here))}"
    if first["type"] == "model_type":
        message += "; " + NULL_REMEDIES.get(field if value is None else "", groups.format(field=field))
    message = re.sub(r"^\w+ should have", "it should have", message)
    return one_line(f"{field}={_short(value)}: {message}" if field else f"{_short(value)}: {message}")


def _asked(error: ErrorDetails) -> str:
    """What a value should be."""
    asked = error["msg"].removeprefix(ASKED)
    asked = re.sub(r"a valid dictionary or instance of \w+", "a group of keys", asked)
    return next((ours for theirs, ours in WORDS.items() if asked.startswith(theirs)), asked)


def _dotted(location: Sequence[str | int], values: Any) -> str:
    """A location as the user would write it in an override: stages by name, without pydantic's names of the types that a
    value may be of."""
    pieces, node = [], values
    for piece in location:
        if isinstance(node, Mapping):
            node = node.get(piece)
        elif isinstance(node, (list, tuple)) and isinstance(piece, int):
            node = node[piece]
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
        if isinstance(key, str):
            section = section_of(section.model_fields[key].annotation) or section
    known = list(section.model_fields)
    near = nearest(str(location[-1]), known)
    return f"did you mean {near}?" if near else f"remove it, or choose from {', '.join(known)}"


def _short(value: object) -> str:
    """A value for an error line."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else one_line(value)
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(value: object) -> str:
    """Its text, however many lines that has."""
    return " ".join(str(value).split())
