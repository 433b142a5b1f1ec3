"""Every command's line: `--config FILE.yaml`, dotted overrides, `--print_config`, errors in one message. Torch-free.

Settings come from three places: the dataclass's defaults, then each `--config` in the order given, then
the command line, wherever `--config` stands on it.
"""

import re
import sys
from argparse import SUPPRESS, ArgumentError
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

from jsonargparse import ArgumentParser, set_parsing_settings

from autoencoder.runtime.command_line import CommandLine
from autoencoder.runtime.config_file import closest, plain, shipped_configs, to_yaml
from autoencoder.runtime.errors import ConfigError, TrainingError, UsageError
from autoencoder.runtime.idle import Idle
from autoencoder.runtime.settings import admits, arguments, groups, required, words

set_parsing_settings(docstring_parse_attribute_docstrings=True)

C = TypeVar("C")


def run(body: Callable[[], int | None]) -> int:
    """Run a command's body and return its exit code: 2 after a `UsageError`, 1 after a `TrainingError`, each one message on stderr."""
    try:
        return body() or 0
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse(
    config_class: type[C],
    argv: list[str] | None,
    *,
    prog: str,
    description: str,
    stage: str | None = None,
    positional: str | None = None,
    idle: Sequence[Idle] = (),
) -> C:
    """The configuration that a command line asks for.

    `stage` is the folder under `configs/` whose files `--config NAME` finds, None for a command that has none; `positional` names the
    `list[str]` setting that bare arguments fill; `idle` says which settings have no effect beside others. Raises `UsageError` for
    whatever cannot be used, and `SystemExit(0)` once `--help` or `--print_config` has printed.
    """
    line = CommandLine(sys.argv[1:] if argv is None else argv, config_class, stage=stage, positional=positional)
    parser = _parser(config_class, prog, description, stage, positional)
    if line.help:
        parser.print_help()
        raise SystemExit(0)
    values = _typed(parser, line)
    missing = [key for key in required(config_class) if key not in line.given]
    if missing and not line.print_config:
        raise UsageError(_missing(parser, missing[0], positional))
    defaults = parser.get_defaults()
    for rule in idle:
        rule.check(line, values, defaults)
    try:
        given = arguments(config_class, values, without=missing)
        config = None if missing else config_class(**given)
    except ConfigError as error:
        raise line.located(error) from None
    if line.print_config or config is None:
        print(to_yaml(plain(given)), end="")
        raise SystemExit(0)
    return config


def load_config(config_class: type[C], file: Path) -> C:
    """The configuration in a YAML file, checked as on a command line."""
    return parse(config_class, ["--config", str(file)], prog="", description="")


def _parser(config_class: type, prog: str, description: str, stage: str | None, positional: str | None) -> ArgumentParser:
    """jsonargparse's parser of the dataclass: it knows types and writes the help."""
    bare = f" {positional.upper()} ..." if positional else ""
    names = ", ".join(shipped_configs(stage))
    shipped = f", or the name of one that ships ({names})" if names else ""
    parser = ArgumentParser(
        exit_on_error=False,
        prog=prog,
        usage=f"{prog}{bare} [--config FILE] [--KEY VALUE ...]",
        description=f"{description} Settings: defaults, then --config, then the command line.",
    )
    parser.add_argument("--config", metavar="FILE", default=SUPPRESS, help=f"YAML file of settings{shipped}. Repeated, later ones win.")
    parser.add_argument("--print_config", action="store_true", default=SUPPRESS, help="Print the whole configuration as YAML and stop.")
    parser.add_class_arguments(config_class, None)
    headings = groups(config_class)
    for action in parser._actions:
        action.option_strings = [option for option in action.option_strings if not option.endswith("+")]
        if action.dest in headings:
            action.help = SUPPRESS
    return parser


def _typed(parser: ArgumentParser, line: CommandLine) -> Callable[[str], Any]:
    """Every setting by its key in its type, defaults included."""
    own = _own_classes(line)
    # jsonargparse would take a group with a `class_path` for a subclass of ours to choose: these two settings it only tells of.
    for action in [action for action in parser._actions if action.dest in own or action.dest in line.classes]:
        parser._actions.remove(action)
    nested: dict[str, Any] = {}
    for key, value in line.given.items():
        if key in own:
            continue
        *path, name = key.split(".")
        inner = nested
        for part in path:
            inner = inner.setdefault(part, {})
        whole = isinstance(value, float) and value.is_integer() and admits(line.types[key], int) and not admits(line.types[key], float)
        inner[name] = int(value) if whole else value
    for action in parser._actions:
        # Missing settings are ours to report: `--print_config` does without them.
        action.required = False
    try:
        values = parser.parse_object(nested)
    except ArgumentError as error:
        match = re.search(r'Parser key "([^"]+)"', str(error))
        if match is None or match[1] not in line.given:
            raise UsageError(str(error)) from error
        raise _wrong_type(line, match[1]) from None
    for key in [key for key in line.given if key not in own]:
        # jsonargparse lets null through for any type.
        if values[key] is None and not admits(line.types[key], type(None)):
            raise _wrong_type(line, key)
    return lambda key: own[key] if key in own else values[key]


def _own_classes(line: CommandLine) -> dict[str, Any]:
    """The settings of each `OwnClass` by dotted key, defaults included; ConfigError for one of another type."""
    found: dict[str, Any] = {}
    for group in line.classes:
        path, arguments = f"{group}.class_path", f"{group}.init_args"
        found |= {path: line.given.get(path), arguments: line.given.get(arguments, {})}
        if not isinstance(found[path], str | None):
            raise _wrong_type(line, path)
        mapping = found[arguments]
        if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping):
            raise _wrong_type(line, arguments)
    return found


def _wrong_type(line: CommandLine, key: str) -> ConfigError:
    value, annotation = line.given[key], line.types[key]
    quoted = " (in quotes)" if admits(annotation, str) and isinstance(value, (int, float)) else ""
    meant = closest(str(value), map(str, get_args(annotation))) if get_origin(annotation) is Literal else []
    hint = f" (closest: {meant[0]})" if meant else ""
    return line.located(ConfigError(key, value, f"give {words(annotation)}{quoted}{hint}"))


def _missing(parser: ArgumentParser, key: str, positional: str | None) -> str:
    help_text = next(action.help for action in parser._actions if action.dest == key)
    how = f"{key.upper()} ..." if key == positional else f"--{key} {key.upper()}"
    return f"{key}: not given; give {how} ({help_text})"
