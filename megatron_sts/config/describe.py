"""What every config key means, from the schema itself. Torch-free."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_sts.config.errors import ConfigError
from megatron_sts.config.nearest import nearest_path
from megatron_sts.config.schema import RunConfig
from megatron_sts.config.section import Section, section_of

LISTED = "*"
"""Stands in a key for the name or index of an entry, as in overrides."""
_BOUNDS = ((annotated_types.Gt, "> ", "gt"), (annotated_types.Ge, ">= ", "ge"), (annotated_types.Lt, "< ", "lt"), (annotated_types.Le, "<= ", "le"))  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A key that a config may hold."""

    name: str
    """Dotted; ``*`` stands for a stage."""
    values: str
    """What it takes, in words."""
    default: str | None
    """As YAML; None: it must be given."""
    meaning: str
    is_section: bool
    """Whether it holds keys of its own."""


def keys() -> tuple[Key, ...]:
    """All of them, in the order of the schema."""
    return tuple(_keys(RunConfig, ""))


def find(name: str) -> list[Key]:
    """The key ``name`` with the keys right below it; else those whose last parts it is.

    A stage may be called by any name or number, or left out.

    Raises:
        ConfigError: there is none.
    """
    parts, known = name.split("."), keys()
    if parts[0] == "stages" and len(parts) > 1:
        spelled = [".".join(["stages", LISTED, *parts[2:]]), ".".join(["stages", LISTED, *parts[1:]])]
    else:
        spelled = [name]
    for wanted in spelled:
        if any(key.name == wanted for key in known):
            return [key for key in known if key.name == wanted or _is_right_below(key.name, wanted)]
    if ends := [key for key in known if key.name.endswith(f".{name}")]:
        return ends
    raise ConfigError(f"config {name}: no such key; {_remedy(spelled, known)}")


def _remedy(spelled: Sequence[str], known: Sequence[Key]) -> str:
    """What to ask for instead of a key that is not there: the nearest by its whole path, else its section, else the nearest by its
    last piece."""
    names = [key.name for key in known]
    if near := next((found for wanted in spelled if (found := nearest_path(wanted, names))), None):
        return f"did you mean {near}?"
    above = spelled[0].rpartition(".")[0]
    if any(key.is_section and key.name == above.removesuffix(f".{LISTED}") for key in known):
        return f"megatron-sts config {above.removesuffix(f'.{LISTED}')} lists what there is"
    near = nearest_path(spelled[0].rpartition(".")[2], names)
    return f"did you mean {near}?" if near else "megatron-sts config lists all"


def _is_right_below(name: str, section: str) -> bool:
    rest = name.removeprefix(f"{section}.").removeprefix(f"{LISTED}.")
    return name.startswith(f"{section}.") and "." not in rest


def _keys(section: type[Section], prefix: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        meaning = field.description or (inner and inner.__doc__) or ""
        default = None if field.is_required() else _default(field, inner)
        yield Key(
            prefix + name, _values(field.annotation, field.metadata), default, _one_line(meaning), inner is not None
        )
        if inner is not None:
            listed = f"{LISTED}." if get_origin(field.annotation) is tuple else ""
            yield from _keys(inner, f"{prefix}{name}.{listed}")


def _default(field: FieldInfo, inner: type[Section] | None) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    assert value is not PydanticUndefined
    return "its keys' defaults" if inner is not None and value is not None else _yaml(value)


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(map(_yaml, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _values(annotation: Any, metadata: Sequence[object] = ()) -> str:
    """A type in words, as in: whole number > 0, or null."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _values(inner[0], _flat(inner[1:]))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if each is type(None) else _values(each) for each in inner)
    if origin is Literal:
        return " | ".join(map(str, inner))
    if origin is tuple:
        is_open = inner[-1] is Ellipsis
        return f"list of {_values(inner[0])}" if is_open else f"[{', '.join(map(_values, inner))}]"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    words = {bool: "true | false", int: "whole number", float: "number", str: "text"}.get(annotation, "mapping")
    bounds = [
        f"{sign}{_yaml(getattr(one, name))}"
        for one in metadata
        for kind, sign, name in _BOUNDS
        if isinstance(one, kind)
    ]
    return " ".join([words, ", ".join(bounds)]).strip()


def _flat(metadata: Sequence[object]) -> list[object]:
    """Pydantic keeps bounds inside of ``Field(...)``."""
    return [each for one in metadata for each in (one.metadata if isinstance(one, FieldInfo) else [one])]


def _one_line(text: str) -> str:
    return " ".join(text.split())
