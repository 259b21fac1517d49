"""Pickles are read as data: what else they name is refused by name, and never run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from megatron_sts.runtime import plain
from megatron_sts.runtime.plain import ARRAYS, PlainDataError


class Planted:
    """Unpickled, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_planted_code_is_refused_and_not_run(tmp_path: Path) -> None:
    content = pickle.dumps({"a": [1, Planted(tmp_path / "marker")]})
    with pytest.raises(
        PlainDataError, match=r"holds more than data: it names posix\.mkdir, which was not looked up or run"
    ):
        plain.loads(content, ARRAYS)
    assert not (tmp_path / "marker").exists()
    pickle.loads(content)  # the plant works
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", pickle.dumps([1, 2])[:-2], pickle.dumps({})[:1]])
def test_what_is_no_pickle_is_refused(content: bytes) -> None:
    with pytest.raises(PlainDataError, match="cannot be unpickled"):
        plain.loads(content, ARRAYS)


def test_data_are_read() -> None:
    written = {"numbers": np.arange(6, dtype=np.uint32).reshape(2, 3), "words": ["a", (1, 2.5, None, b"x")]}
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        found = plain.loads(pickle.dumps(written, protocol), {**ARRAYS, ("_codecs", "encode"): None})
        assert found["words"] == written["words"]
        np.testing.assert_array_equal(found["numbers"], written["numbers"])
