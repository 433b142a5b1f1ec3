"""A command line and the files that it names, taken apart into settings by dotted key. Torch-free."""

from pathlib import Path
from typing import Any

from autoencoder.runtime.config_file import closest, find_config, read_config, read_value
from autoencoder.runtime.errors import ConfigError, UsageError
from autoencoder.runtime.own_class import with_entry
from autoencoder.runtime.settings import admits, class_groups, groups, literals, settings, takes_list, words


class CommandLine:
    """What was given: settings as they stand there, unchecked but for their keys, and which file each is from.

    `--KEY VALUE` and `--KEY=VALUE` override what files say; a later one overrides an earlier one. A
    switch (bool) needs no value. Keys are given whole: an abbreviation would change its meaning with
    the next setting that is added. A group that names a class (`OwnClass`) takes its path alone, `--KEY mypackage.Class`,
    and arguments of the class one by one, `--KEY.init_args.NAME VALUE`, beside those that a file gives; null for its path takes back
    the arguments that earlier files gave.
    """

    def __init__(self, argv: list[str], config_class: type, *, stage: str | None, positional: str | None) -> None:
        """Raises `UsageError` for keys that do not exist, values that are missing and files that cannot be read."""
        self.types = settings(config_class)
        self.groups = groups(config_class)
        self.classes = class_groups(self.types)
        self.given: dict[str, Any] = {}
        self.files: dict[str, Path] = {}
        self.layers: list[set[str]] = []
        """Keys by what gave them: each file in its turn, then the command line."""
        self.print_config = False
        self.help = "-h" in argv or "--help" in argv
        if not self.help:
            self._read(list(argv), stage, positional)

    def located(self, error: ConfigError) -> ConfigError:
        """The same error, with the file that its value came from."""
        if error.key not in self.files:
            return error
        return ConfigError(error.key, error.given, f"{error.remedy} (in {self.files[error.key]})")

    def rank(self, key: str) -> int:
        """Where the value of a setting stands among the files and the command line, which is last; -1 for a default."""
        return max((place for place, keys in enumerate(self.layers) if key in keys), default=-1)

    def on_command_line(self, key: str) -> bool:
        return key in self.given and key not in self.files

    def whole_group(self, key: str) -> bool:
        """Whether what gave a setting gave all the settings of its group."""
        group = key.rpartition(".")[0]
        return {name for name in self.types if name.rpartition(".")[0] == group} <= self.layers[self.rank(key)]

    def _read(self, rest: list[str], stage: str | None, positional: str | None) -> None:
        overrides: list[tuple[str, Any]] = []
        bare: list[str] = []
        while rest:
            token = rest.pop(0)
            key, equals, value = token.removeprefix("--").partition("=")
            if not token.startswith("-"):
                bare.append(token)
            elif token == "--print_config":
                self.print_config = True
            elif key == "config":
                wanted = "the path of a YAML file" + ("" if stage is None else " or a shipped configuration's name")
                name = value if equals else _value(key, rest, wanted)
                path = find_config(name, stage)
                self.layers.append(set())
                self._merge(read_config(path), path, "")
            else:
                key = self._class_path(key)
                argument = self._argument(key)
                self._check_key(key if argument is None else argument[0], "")
                overrides.append((key, value if equals else self._setting_value(key, rest)))
        if bare and positional is None:
            raise UsageError(f"{bare[0]}: an argument that belongs to no setting; give settings as --KEY VALUE")
        if bare and positional is not None:
            overrides.append((positional, bare))
        self.layers.append(set())
        for key, value in overrides:
            self._override(key, value)

    def _override(self, key: str, value: Any) -> None:
        """Take a setting from the command line; an argument of a class joins those that are given already."""
        argument = self._argument(key)
        if argument is not None:
            key, name = argument
            before = self.given.get(key)
            self.given[key] = with_entry(before if isinstance(before, dict) else {}, name, read_value(value))
        elif key.rpartition(".")[0] in self.classes and key.endswith(".init_args"):
            self.given[key] = read_value(value)
        elif key.endswith(".class_path") and key.rpartition(".")[0] in self.classes:
            self.given[key] = None if value and read_value(value) is None else value
        elif value == "null" and admits(self.types[key], type(None)):
            self.given[key] = None
        else:
            self.given[key] = _listed(value, self.types[key])
        self.files.pop(key, None)
        self.layers[-1].add(key)
        self._forget_arguments(key)

    def _forget_arguments(self, key: str) -> None:
        """Where the path of a class has just become null: forget the arguments that earlier layers gave it."""
        group, _, name = key.rpartition(".")
        arguments = f"{group}.init_args"
        if group in self.classes and name == "class_path" and self.given[key] is None and arguments not in self.layers[-1]:
            self.given.pop(arguments, None)
            self.files.pop(arguments, None)

    def _class_path(self, key: str) -> str:
        """The class path for the group that it is of."""
        return f"{key}.class_path" if key in self.classes else key

    def _argument(self, key: str) -> tuple[str, str] | None:
        """`(GROUP.init_args, NAME)` for `GROUP.init_args.NAME`, else None."""
        group, found, name = key.partition(".init_args.")
        return (f"{group}.init_args", name) if found and name and group in self.classes else None

    def _setting_value(self, key: str, rest: list[str]) -> Any:
        if self._argument(key) is not None:
            return _value(key, rest, "the value of this argument")
        if self.types[key] is bool and not (rest and rest[0].lower() in ("true", "false", "yes", "no")):
            return True
        return _value(key, rest, words(self.types[key]))

    def _merge(self, content: dict[str, Any], file: Path, prefix: str) -> None:
        for name, value in content.items():
            key = f"{prefix}{name}"
            if key in self.groups and isinstance(value, dict):
                self._merge(value, file, f"{key}.")
                continue
            key = self._class_path(key)
            self._check_key(key, f" (in {file})")
            if self.files.get(key) is file:
                raise UsageError(f"{file}: `{key}` is given twice")
            self.given[key], self.files[key] = value, file
            self.layers[-1].add(key)
            self._forget_arguments(key)

    def _check_key(self, key: str, where: str) -> None:
        if key in self.groups:
            inside = [name for name in self.types if name.startswith(f"{key}.")]
            raise UsageError(f"{key}: a group of settings; give them one by one ({', '.join(inside[:3])}, ...), or leave it out{where}")
        if key not in self.types:
            near = closest(key, [*self.types, "config", "print_config"])
            remedy = f"closest: {', '.join(near)}" if near else "--help lists all"
            raise UsageError(f"{key}: no such setting; {remedy}{where}")


def _listed(value: Any, annotation: Any) -> Any:
    """`a,b` for a list or tuple as `[a,b]`, which is how YAML writes it."""
    if not isinstance(value, str) or not takes_list(annotation) or value.startswith("[") or value in ("", "null", *literals(annotation)):
        return value
    return f"[{value}]"


def _value(key: str, rest: list[str], wanted: str) -> str:
    """The next argument, unless it is an option."""
    if not rest or rest[0].startswith("--"):
        raise UsageError(f"{key}: no value given; give {wanted}")
    return rest.pop(0)
