"""Configurations as YAML: found, read, written and compared by dotted key. Torch-free."""

import dataclasses
import difflib
import re
from collections.abc import Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from autoencoder.runtime.errors import UsageError

COMMANDS = {"autoencoder": "train_autoencoder", "latents": "encode_dataset", "diffusion": "train_diffusion"}
"""Whose configurations a stage's are."""

_PACKAGE = Path(__file__).parents[1]


def find_config(given: str, stage: str | None) -> Path:
    """The file that `--config given` means: a path, else the name of a configuration shipped for `stage` (None: none are)."""
    path = Path(given).expanduser()
    if path.is_file():
        return path
    shipped = shipped_configs(stage)
    if given in shipped:
        return shipped[given]
    names = f", or one of those that ship: {', '.join(shipped)}" if shipped else ""
    meant = closest(Path(given).stem, shipped)
    others = [command for other, command in COMMANDS.items() if given in shipped_configs(other)]
    hint = f" (closest: {', '.join(meant)})" if meant else ""
    if others:
        hint = f" (the `{given}` that ships is for {', '.join(others)})"
    problem = "a folder" if path.is_dir() else "no such file"
    raise UsageError(f"config: got {given!r}, {problem}; give the path of a YAML file{names}{hint}")


def shipped_configs(stage: str | None) -> dict[str, Path]:
    """Names and files of the configurations for `stage`: package data in a wheel, `configs/` in a checkout; none for None."""
    if stage is None:
        return {}
    installed = _PACKAGE / "configs"
    folder = installed if installed.is_dir() else _PACKAGE.parent / "configs"
    return {path.stem: path for path in sorted((folder / stage).glob("*.yaml"))}


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file (an empty file is an empty one).

    Numbers such as `1e-3` are floats, as in YAML 1.2. Raises `UsageError` for a file that cannot be
    read, for broken YAML and keys given twice (with their line), and for anything but a mapping.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not text in UTF-8, so no YAML; give a YAML file") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{path}, line {line}: {error.problem}; mend the YAML there") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: {error}; give a YAML file") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path}: holds a {type(content).__name__}; give a mapping of settings such as `data: {{resolution: 64}}`")
    return content


def read_value(text: str) -> Any:
    """A value as YAML writes it, such as `3`, `1e-3`, `[1, 2]` or `{a: 1}`; text that is no YAML is itself."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def to_yaml(values: Mapping[str, object]) -> str:
    """Nested settings as YAML that `read_config` reads back unchanged; lists stand on one line."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)


def plain(value: Any) -> Any:
    """A configuration as nested dictionaries, lists and scalars: what YAML can hold."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def dotted(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"data": {"resolution": 64}}` as `{"data.resolution": 64}`."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        flat |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def closest(given: str, known: Iterable[str]) -> list[str]:
    """Up to three of the dotted names in `known` that `given` may have meant, best first."""
    names = list(known)
    # Settings have underscores where a name may have hyphens.
    wanted = given if any("-" in name for name in names) else given.replace("-", "_")
    group, _, last = wanted.rpartition(".")
    ends = difflib.get_close_matches(last, {name.rpartition(".")[2] for name in names}, cutoff=0.75)
    sure = [name for name in names if name.rpartition(".")[2] == last or name.startswith(wanted)]
    near = [name for end in ends for name in names if name.rpartition(".")[2] == end]
    near.sort(key=lambda name: name.rpartition(".")[0] != group)
    return (sure or near)[:3]


# YAML 1.1, which PyYAML speaks, takes `1e-3` for text.
_EXPONENT = re.compile(r"[-+]?\d[\d_]*(?:\.[\d_]*)?[eE][-+]?\d+$")


class _Loader(yaml.SafeLoader):
    """Safe YAML without silently overwritten keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"`{key.value}` is given twice", key.start_mark)
            seen.add(key.value if isinstance(key.value, str) else None)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Safe YAML with lists on one line."""

    def represent_sequence(self, tag: str, sequence: Iterable[Any], flow_style: bool | None = None) -> yaml.SequenceNode:
        return super().represent_sequence(tag, sequence, flow_style=True)

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _yaml in (_Loader, _Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
