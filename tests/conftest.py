"""What holds for all tests: untimed examples, and a server of warm processes while they run."""

import contextlib
import os

import pytest
from hypothesis import settings

from tests import warm

# An example's time says how busy the machine is, not whether the code is right.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

_session = contextlib.ExitStack()


def pytest_configure() -> None:
    """One for all of pytest-xdist's workers, which inherit its address."""
    if warm.SOCKET not in os.environ and warm.is_possible():
        _session.enter_context(warm.server())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Workers of pytest-xdist begin with the files that take longest, or one would end long after the other."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow") or item.get_closest_marker("timeout")}
        items.sort(key=lambda item: item.path not in slow)


def pytest_unconfigure() -> None:
    _session.close()
