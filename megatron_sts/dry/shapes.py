"""Remembers which shapes an operation gives for which: what a meta tensor operation does, without doing it again."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Size, strides and format of a tensor."""


class KnownShapes:
    """Runs operations. torch works most shapes out in Python, which takes longer than all else in a dry run."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[bool, tuple[Form, ...]]] = {}

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """``func(*args, **kwargs)``, of an operation that neither changes nor shares an argument from memory."""
        key = (
            (func, *map(_form, args), *((name, _form(value)) for name, value in kwargs.items()))
            if _is_pure(func)
            else None
        )
        try:
            known = self._known.get(key)
        except TypeError:  # an argument that has no hash
            key = known = None
        if known is not None:
            is_one, forms = known
            made = [torch.empty_strided(size, strides, dtype=dtype, device="meta") for size, strides, dtype in forms]
            return made[0] if is_one else tuple(made)
        out = func(*args, **kwargs)
        results = (out,) if isinstance(out, torch.Tensor) else out
        if key is not None and isinstance(results, tuple) and _have_own_memory(results, args):
            forms = tuple((each.size(), each.stride(), each.dtype) for each in results)
            self._known[key] = isinstance(out, torch.Tensor), forms
        return out


@cache
def _is_pure(func: Any) -> bool:
    """Whether it says that it computes new tensors from others, and does nothing else."""
    arguments, returns = func._schema.arguments, func._schema.returns
    takes_tensors = any("Tensor" in str(argument.type) for argument in arguments)
    is_shared = any(each.alias_info is not None for each in (*arguments, *returns))
    return func.namespace == "aten" and takes_tensors and not is_shared


def _form(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.size(), value.stride(), value.dtype, value.device.type
    return tuple(map(_form, value)) if isinstance(value, (list, tuple)) else (type(value), value)


def _have_own_memory(results: tuple[Any, ...], args: tuple[Any, ...]) -> bool:
    """``_unsafe_view``, for one, does not say that it gives the memory of its argument."""
    if not all(isinstance(each, torch.Tensor) and each.is_meta for each in results):
        return False
    given = {each.untyped_storage()._cdata for each in args if isinstance(each, torch.Tensor)}
    made = {each.untyped_storage()._cdata for each in results}
    return len(made) == len(results) and not made & given
