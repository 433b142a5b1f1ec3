"""The settings of a configuration dataclass by dotted key: types, words for them, construction. Torch-free."""

import dataclasses
import types
import typing
from collections.abc import Callable, Collection
from typing import Any, Literal, TypeVar, get_args, get_origin

from autoencoder.runtime.errors import ConfigError

C = TypeVar("C")


def settings(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Type of every setting by its dotted key, nested dataclasses opened."""
    found: dict[str, Any] = {}
    for name, annotation in typing.get_type_hints(config_class).items():
        key = f"{prefix}{name}"
        found |= settings(annotation, f"{key}.") if _is_group(annotation) else {key: annotation}
    return found


def groups(config_class: type) -> set[str]:
    """Dotted keys of the nested dataclasses."""
    keys = [key.split(".")[:-1] for key in settings(config_class)]
    return {".".join(parts[: n + 1]) for parts in keys for n in range(len(parts))}


def class_groups(keys: Collection[str]) -> set[str]:
    """Dotted keys of the groups that name a class of the user's own (`OwnClass`), among the dotted keys of all settings."""
    return {key.removesuffix(".class_path") for key in keys if key.endswith(".class_path")}


def required(config_class: type) -> list[str]:
    """Settings without a default (top level only: nested dataclasses have one as a whole)."""
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(config_class) if f.default is missing and f.default_factory is missing]


def construct(config_class: type[C], value_of: Callable[[str], Any], prefix: str = "") -> C:
    """Build the dataclass and those nested in it; a `ConfigError` comes out with the whole dotted key."""
    values = arguments(config_class, value_of, prefix)
    try:
        return config_class(**values)
    except ConfigError as error:
        raise error.under(prefix.removesuffix(".")) from None


def arguments(config_class: type, value_of: Callable[[str], Any], prefix: str = "", without: Collection[str] = ()) -> dict[str, Any]:
    """The dataclass's arguments by name, nested dataclasses built, `without` left out."""
    return {
        name: construct(hint, value_of, f"{prefix}{name}.") if _is_group(hint) else value_of(f"{prefix}{name}")
        for name, hint in typing.get_type_hints(config_class).items()
        if name not in without
    }


def words(annotation: Any) -> str:
    """What a setting of this type takes, in words: `an integer or null`."""
    if annotation in _SIMPLE:
        return _SIMPLE[annotation]
    origin, options = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _either([f"`{option}`" for option in options])
    if origin in (typing.Union, types.UnionType):
        return _either([words(option) for option in options])
    if origin is tuple and Ellipsis not in options:
        return f"a list of {len(options)}: {', '.join(words(option) for option in options)}"
    if origin is dict:
        return "a mapping such as {width: 32, mode: fast}"
    if origin in (list, tuple):
        return f"a list such as [{'a, b' if options[0] is str else '1, 2'}], each {words(options[0])}"
    return str(annotation)


def admits(annotation: Any, kind: type) -> bool:
    """Whether `kind` is the type, or one of the alternatives of a union."""
    alternatives = get_args(annotation) if get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    return kind in alternatives


def takes_list(annotation: Any) -> bool:
    """Whether a setting of this type is a list or a tuple, perhaps among alternatives."""
    alternatives = get_args(annotation) if get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    return any(get_origin(alternative) in (list, tuple) for alternative in alternatives)


def literals(annotation: Any) -> tuple[Any, ...]:
    """The values that are written out among the alternatives of a union."""
    alternatives = get_args(annotation) if get_origin(annotation) in (typing.Union, types.UnionType) else (annotation,)
    return tuple(value for alternative in alternatives if get_origin(alternative) is Literal for value in get_args(alternative))


_SIMPLE = {int: "an integer", float: "a number", str: "text", bool: "`true` or `false`", type(None): "`null`"}


def _is_group(annotation: Any) -> bool:
    return dataclasses.is_dataclass(annotation)


def _either(options: list[str]) -> str:
    return options[0] if len(options) == 1 else f"{', '.join(options[:-1])} or {options[-1]}"
