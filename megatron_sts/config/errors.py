"""The one exception that means "the user's configuration is wrong"; the command line turns it into exit code 2."""


class ConfigError(ValueError):
    """One line naming the field, the offending value and the remedy."""
