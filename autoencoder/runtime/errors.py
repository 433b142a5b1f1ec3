"""Errors that are a user's to mend: one message, exit code 2, no traceback."""


class UsageError(Exception):
    """Something the user gave cannot be used; the message says what, what is allowed and what to do."""


class ConfigError(UsageError, ValueError):
    """A configuration value that cannot be used.

    `key` is relative to the dataclass that refuses it; the command line puts the
    path of that dataclass before it, so that the user reads `data.resolution`.
    """

    def __init__(self, key: str, given: object, remedy: str) -> None:
        self.key, self.given, self.remedy = key, given, remedy
        # None is what a setting is that nobody gave.
        super().__init__(f"{key}: {'not given' if given is None else f'got {given!r}'}; {remedy}")

    def under(self, prefix: str) -> "ConfigError":
        """The same refusal with `prefix` before its key."""
        return ConfigError(f"{prefix}.{self.key}" if prefix else self.key, self.given, self.remedy)


def require(condition: bool, key: str, given: object, remedy: str) -> None:
    """Raise `ConfigError` unless `condition` holds."""
    if not condition:
        raise ConfigError(key, given, remedy)


def sibling(key: str, name: str) -> str:
    """The dotted key of the setting `name` that stands beside `key`."""
    return f"{key[: key.rfind('.') + 1]}{name}"


def first_line(error: Exception) -> str:
    """What a library's error says first; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class TrainingError(Exception):
    """Training cannot go on (a non-finite loss, say); the message says what happened and what to try. Exit code 1."""
