"""Unpickling as data: nothing but the types that a format needs is ever looked up, so that no file can run code."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import IO, Any

Names = Mapping[tuple[str, str], Callable[..., Any] | None]
"""What a pickle may name, as (module, name): None for that object itself, or what stands in for it."""

ARRAYS: Names = {
    ("numpy", "dtype"): None,
    ("numpy", "ndarray"): None,
    ("numpy._core.multiarray", "_reconstruct"): None,
    ("numpy._core.numeric", "_frombuffer"): None,
    ("numpy.core.multiarray", "_reconstruct"): None,
}
"""NumPy arrays."""


class PlainDataError(ValueError):
    """A file that holds more than data. The message says what it names; where it lies is for the caller to add."""


def load(file: IO[bytes], names: Names) -> Any:
    """What a pickle holds.

    Raises:
        PlainDataError: it names something that is not in ``names``, or is no pickle.
    """
    try:
        return _Unpickler(file, names).load()
    except PlainDataError:
        raise
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        ImportError,
        IndexError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:
        raise PlainDataError(f"cannot be unpickled ({type(error).__name__}: {error})") from error  # fmt: skip


def loads(content: bytes, names: Names) -> Any:
    """The same for bytes."""
    return load(io.BytesIO(content), names)


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes], names: Names) -> None:
        super().__init__(file)
        self._names = names

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in self._names:
            raise PlainDataError(
                f"holds more than data: it names {module_name}.{global_name}, which was not looked up or run"
            )
        return self._names[module_name, global_name] or super().find_class(module_name, global_name)
