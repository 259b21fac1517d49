"""The least, the largest and odd values of every field of a config, from the schema itself."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from megatron_sts.config.schema import RunConfig

NUMBERS: dict[type, tuple[Any, ...]] = {
    bool: (True, False),
    int: (-1, 0, 1, 2, 3, 5, 8, 1024),
    float: (-1.0, 0.0, 1e-300, 1e-9, 0.3, 1.0, 1.5, 1e9, 1e300),
}
SLOW = {
    "num_layers": 8,
    "num_turns": 5,
    "num_questions": 2,
    "steps": 3,
    "max_images": 3,
    "image_size": 24,
    "num_workers": 2,
}
"""Larger values of these only take longer."""
Edge = tuple[tuple[str | int, ...], Any]
"""Keys of a field, and its value."""


def edges(section: type[BaseModel] = RunConfig, place: tuple[str | int, ...] = ()) -> Iterator[Edge]:
    """Of every field; of stages, those of the first."""
    for name, field in section.model_fields.items():
        sections = [
            kind for kind in _within(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)
        ]
        if sections:
            yield from edges(sections[0], (*place, name, 0) if name == "stages" else (*place, name))
            continue
        for value in _values(field.annotation):
            if name not in SLOW or not isinstance(value, int) or value <= SLOW[name]:
                yield (*place, name), value


def _within(annotation: Any) -> Iterator[Any]:
    yield annotation
    for inner in get_args(annotation):
        yield from _within(inner)


def _values(annotation: Any) -> list[Any]:
    """What may be written for a type, and what may not."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(inner[0])
    if origin in (Union, types.UnionType):
        return [value for kind in inner for value in _values(kind)]
    if origin is Literal:
        return list(inner)
    if origin is tuple and inner[-1] is Ellipsis:
        values = _values(inner[0])
        return [[], *([value] for value in values), values[:2], values[-2:]]
    if origin is tuple:
        each = [_values(kind) for kind in inner]
        return [
            [0.5] * place + [value] + [0.5] * (len(each) - place - 1)
            for place in range(len(each))
            for value in each[place]
        ]
    return [None] if annotation is type(None) else list(NUMBERS.get(annotation, ()))
