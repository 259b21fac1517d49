"""Where two configs differ, field by field. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence


def differences(old: object, new: object, field: str) -> Iterator[tuple[str, object, object]]:
    """(dotted field, old, new) for each leaf that differs. Entries of a list are addressed by their ``name``, if any."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*new, *(key for key in old if key not in new)]:
            yield from differences(old.get(key), new.get(key), f"{field}.{key}")
    elif _is_named(old) and _is_named(new) and [e["name"] for e in old] == [e["name"] for e in new]:  # type: ignore[attr-defined]
        for before, now in zip(old, new, strict=True):  # type: ignore[call-overload]
            yield from differences(before, now, f"{field}.{now['name']}")
    elif old != new and not (_is_unsaid(old) and _is_unsaid(new)):
        names = _is_named(old) and _is_named(new)
        yield (field, [e["name"] for e in old], [e["name"] for e in new]) if names else (field, old, new)  # type: ignore[attr-defined]


def _is_unsaid(value: object) -> bool:
    """Null, or a section of nulls, which an earlier version did not have."""
    return value is None or (isinstance(value, Mapping) and all(map(_is_unsaid, value.values())))


def _is_named(value: object) -> bool:
    return isinstance(value, Sequence) and all(isinstance(entry, Mapping) and "name" in entry for entry in value)
