"""A class of the user's own, by its import path: what is configured of it, and one way to find and construct it. Torch-free.

As Lightning's and jsonargparse's command lines have it: `class_path` is what an import statement would name, `init_args` are keyword
arguments.
"""

import importlib
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from autoencoder.runtime.config_file import closest
from autoencoder.runtime.errors import ConfigError, UsageError, first_line, require


@dataclass(frozen=True, kw_only=True)
class OwnClass:
    """A class of your own in place of one of ours."""

    class_path: str | None = None
    """Import path of the class, such as mypackage.metrics.Dists; modules in the working directory are found too. Null: none."""
    init_args: dict[str, Any] = field(default_factory=dict)
    """Its keyword arguments: a mapping, or one by one as `init_args.NAME VALUE`."""

    def __post_init__(self) -> None:
        if self.class_path is None:
            remedy = "they are arguments of a class: leave them out, or give class_path with them"
            require(not self.init_args, "init_args", self.init_args, remedy)
            return
        named = all(part.isidentifier() for part in self.class_path.split(".")) and "." in self.class_path
        require(named, "class_path", self.class_path, "give an import path: module.Class or package.module.Class")
        try:
            # As they stand in config.yaml and in the provenance of what is made with them.
            json.dumps(self.init_args, allow_nan=False)
        except (TypeError, ValueError) as error:
            # NaN is unlike itself: no run with it could go on.
            remedy = f"give text, finite numbers, true, false, null, and lists and mappings of them ({error})"
            raise ConfigError("init_args", self.init_args, remedy) from None

    @property
    def given(self) -> bool:
        """Whether there is one."""
        return self.class_path is not None

    def __str__(self) -> str:
        """`mypackage.metrics.Dists(alpha=0.5)`; without arguments the path alone."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.init_args.items())
        return f"{self.class_path}({arguments})" if arguments else str(self.class_path)

    def to_json(self) -> dict[str, Any]:
        """Path and arguments, for a record of what was made with it."""
        return {"class_path": self.class_path, "init_args": dict(self.init_args)}


def find_class(own: OwnClass, key: str, **ours: Any) -> Callable[..., Any]:
    """Import what `own`, configured under `key`, names, and see that it takes its arguments and `ours`; nothing is constructed.

    The working directory is searched after all other places, so that a file there takes no installed module's place.

    Raises:
        ConfigError: no such module, no such name in it, nothing that can be called, arguments that it does not take; or whatever its
            import raised.
    """
    assert own.class_path is not None
    path = own.class_path
    module_name, _, name = path.rpartition(".")
    module = _import(module_name, path, f"{key}.class_path")
    found = getattr(module, name, None)
    if not hasattr(module, name):
        near = closest(name, [known for known in vars(module) if not known.startswith("_")])
        where = getattr(module, "__file__", None) or "a package without __init__.py"
        hint = f" (closest: {', '.join(near)})" if near else ""
        raise ConfigError(f"{key}.class_path", path, f"the module {module_name} ({where}) has no {name}{hint}")
    if not callable(found):
        raise ConfigError(f"{key}.class_path", path, f"it is a {type(found).__name__}; give a class, or a function that returns an object")
    double = [argument for argument in own.init_args if argument in ours]
    require(not double, f"{key}.init_args", own.init_args, f"{', '.join(double)} is given by us: leave it out")
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        # Classes written in C have none to look at.
        return found
    try:
        signature.bind(**ours, **own.init_args)
    except TypeError as error:
        besides = f", of which we give {', '.join(ours)}" if ours else ""
        raise ConfigError(f"{key}.init_args", own.init_args, f"{error}; {path} takes {_shown(signature)}{besides}") from None
    return found


def build_own(own: OwnClass, key: str, **ours: Any) -> Any:
    """An object of the class that `own`, configured under `key`, names, from its arguments and `ours`.

    Raises:
        ConfigError: as `find_class`; or whatever its constructor raised.
    """
    made = find_class(own, key, **ours)
    try:
        return made(**ours, **own.init_args)
    except (Exception, SystemExit) as error:
        raise ConfigError(f"{key}.class_path", own.class_path, f"constructing {own} raised {raised(error)}") from error


def raised(error: BaseException) -> str:
    """What somebody else's code raised and where, in a line: `ValueError: no such mode (metrics.py, line 12)`."""
    frames = traceback.extract_tb(error.__traceback__)
    # The user's line rather than that of a library that it called.
    theirs = [frame for frame in frames if not frame.filename.startswith(_NOT_THEIRS) and "site-packages" not in frame.filename] or frames
    where = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({Path(error.filename).name}, line {error.lineno})"
    kind = type(error).__name__
    said = first_line(error) if isinstance(error, Exception) else str(error)
    return (f"{kind}: {said}" if said not in ("", kind) else kind) + where


_NOT_THEIRS = (str(Path(__file__).parents[1]) + os.sep, "<frozen ")
"""Starts of the file names of our own code and of the import system."""


def _import(name: str, path: str, key: str) -> Any:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        # For good: what it imports later, and loader processes that unpickle its objects, look there too.
        sys.path.append(here)
    importlib.invalidate_caches()
    root = name.partition(".")[0]
    require(root != "__main__", key, path, "__main__ is this command itself; give the name of the class's file, without .py")
    # One that is imported already may have no spec to find.
    if "torch" not in sys.modules and (root in sys.modules or find_spec(root) is not None):
        # A module of networks imports torchvision, which may not fit torch: as before our own imports of it.
        importlib.import_module("autoencoder.runtime.torchvision_operators")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name == missing or name.startswith(f"{missing}."):
            places = f"looked among the installed packages and in the working directory, {here}"
            raise ConfigError(key, path, f"there is no module {missing}; {places}") from None
        raise ConfigError(key, path, f"importing {name} needs the module {missing}, which is not installed") from None
    except UsageError:
        raise
    except SystemExit as error:
        remedy = 'put what it does as a command under `if __name__ == "__main__"`'
        raise ConfigError(key, path, f"importing {name} raised {raised(error)}; {remedy}") from error
    except Exception as error:
        raise ConfigError(key, path, f"importing {name} raised {raised(error)}") from error


def _shown(signature: inspect.Signature) -> str:
    """`(alpha: float = 1.0)`, without what it returns."""
    return str(signature.replace(return_annotation=inspect.Signature.empty))


def with_entry(arguments: Mapping[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """A copy of nested `arguments` in which the entry of this dotted name has this value."""
    name, _, inner = dotted.partition(".")
    if not inner:
        return {**arguments, name: value}
    below = arguments.get(name)
    return {**arguments, name: with_entry(below if isinstance(below, Mapping) else {}, inner, value)}
