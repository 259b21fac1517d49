"""One process as a whole process group."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from megatron_sts.mcore import groups
from megatron_sts.runtime.dist import process_group
from tests.parity.hf import resolved_model


@pytest.fixture
def one_rank() -> Iterator[None]:
    with process_group(60.0):
        groups.initialize(resolved_model().config.parallel, seed=1)
        yield
        groups.destroy()
