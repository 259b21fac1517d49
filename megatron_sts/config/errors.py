"""The one exception that means "the user's configuration is wrong"; the command line turns it into exit code 2."""

from __future__ import annotations

from typing import NoReturn


class ConfigError(ValueError):
    """One line naming the field, the offending value and the remedy."""

    is_echo = False
    """Another rank raised it first, and says it."""


class MissingHereError(ConfigError):
    """What is missing is a package, which another machine may have."""


class OtherRunError(ConfigError):
    """A run's folder holds a run of another config."""


def refuse(field: str, value: object, why: str, remedy: str, kind: type[ConfigError] = ConfigError) -> NoReturn:
    """Stop with the one-line message every wrong config gets."""
    raise kind(f"{field}={value}: {why}; {remedy}")
