"""Classes of a user's own by `class_path` and `init_args`: given in files and on the command line, found, constructed, refused."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoencoder.runtime import cli
from autoencoder.runtime.config_file import plain, to_yaml
from autoencoder.runtime.errors import ConfigError, UsageError
from autoencoder.runtime.own_class import OwnClass, build_own, find_class

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Room:
    """A room."""

    own: OwnClass = field(default_factory=OwnClass)
    """Yours."""
    size: float = 1.0
    """Size."""


@dataclass(frozen=True, kw_only=True)
class House:
    """A house."""

    room: Room = field(default_factory=Room)
    """A room."""


def parsed(*argv: str) -> OwnClass:
    return cli.parse(House, list(argv), prog="house", description="Build.").room.own


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the working directory, which is nowhere on the path, under a name that no other test has."""
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place not in ("", str(tmp_path))])
    (tmp_path / f"{name}.py").write_text(
        "NUMBER = 3\n"
        "class Ruler:\n"
        "    def __init__(self, length: int, unit: str = 'cm') -> None:\n"
        "        if length < 0:\n"
        "            raise ValueError('no such length')\n"
        "        self.length, self.unit = length, unit\n"
        "def ruler(**options):\n"
        "    return Ruler(**options)\n"
    )
    yield name
    sys.modules.pop(name, None)


MANY = {"a": 1, "b": 1e-3, "c": "x", "d": [1, 2], "e": {"f": None}, "g": True, "class_path": "z.Z"}


def test_path_and_arguments_come_from_a_file_with_their_types(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"room": {"own": {"class_path": "mine.Ruler", "init_args": MANY}}}))
    assert parsed("--config", str(file)) == OwnClass(class_path="mine.Ruler", init_args=MANY)
    file.write_text("room: {own: mine.Ruler}")
    assert parsed("--config", str(file)) == OwnClass(class_path="mine.Ruler")


def test_path_and_arguments_come_from_the_command_line_with_their_types() -> None:
    mapping = "{a: 1, b: 1e-3, c: x, d: [1, 2], e: {f: null}, g: true, class_path: z.Z}"
    assert parsed("--room.own.class_path=mine.Ruler", "--room.own.init_args", mapping).init_args == MANY
    assert parsed("--room.own", "mine.Ruler", "--room.own.init_args", '{"a": 1, "b": [true]}').init_args == {"a": 1, "b": [True]}
    single = ["--room.own.init_args.a", "1", "--room.own.init_args.b=1e-3", "--room.own.init_args.e.f", "-2", "--room.own.init_args.c=x y"]
    assert parsed("--room.own=mine.Ruler", *single).init_args == {"a": 1, "b": 1e-3, "e": {"f": -2}, "c": "x y"}


def test_single_arguments_join_those_of_a_file_and_a_mapping_replaces_them(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("room: {own: {class_path: mine.Ruler, init_args: {length: 1, unit: m}}}")
    assert parsed("--room.own.init_args.length=7", "--config", str(file)).init_args == {"length": 7, "unit": "m"}
    assert parsed("--room.own.init_args={length: 7}", "--config", str(file)).init_args == {"length": 7}
    assert parsed("--room.own.init_args={}", "--config", str(file)).init_args == {}


@pytest.mark.parametrize("key", ["room.own", "room.own.class_path"])
def test_null_switches_off_a_class_of_a_file_with_its_arguments(key: str, tmp_path: Path) -> None:
    first, later = tmp_path / "first.yaml", tmp_path / "later.yaml"
    first.write_text("room: {own: {class_path: mine.Ruler, init_args: {length: 1}}}")
    assert parsed("--config", str(first), f"--{key}=null") == OwnClass()
    assert parsed("--config", str(first), f"--{key}", "null", "--room.own=mine.Rod") == OwnClass(class_path="mine.Rod")
    later.write_text("room: {own: null}" if key == "room.own" else "room: {own: {class_path: null}}")
    assert parsed("--config", str(first), "--config", str(later)) == OwnClass()
    assert parsed("--config", str(later), "--config", str(first)).init_args == {"length": 1}
    # Arguments beside it, in the same place, are a mistake in either order.
    for argv in ([f"--{key}=null", "--room.own.init_args.a=1"], ["--room.own.init_args.a=1", f"--{key}=null"]):
        with pytest.raises(ConfigError, match=r"room\.own\.init_args: .* give class_path with them"):
            parsed("--config", str(first), *argv)


def test_what_is_printed_is_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    house = House(room=Room(own=OwnClass(class_path="mine.Ruler", init_args=MANY)))
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(plain(house)))
    assert cli.load_config(House, file) == house
    with pytest.raises(SystemExit):
        parsed("--config", str(file), "--print_config")
    file.write_text(capsys.readouterr().out)
    assert cli.load_config(House, file) == house


def test_help_tells_of_both_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--help")
    said = capsys.readouterr().out
    assert "--room.own.class_path" in said and "--room.own.init_args" in said and "import path" in said.lower()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--room.own.class_path=3"], r"^room\.own\.class_path: got '3'; give an import path: module\.Class"),
        (["--room.own=Ruler"], r"^room\.own\.class_path: got 'Ruler'; give an import path"),
        (["--room.own=mine.Ruler", "--room.own.init_args=3"], r"^room\.own\.init_args: got 3; give a mapping such as"),
        (["--room.own=mine.Ruler", "--room.own.init_args={1: 2}"], r"^room\.own\.init_args: got \{1: 2\}; give a mapping such as"),
        (["--room.own=mine.Ruler", "--room.own.init_args.day=2020-01-01"], r"^room\.own\.init_args: .*give text, finite numbers, .* date"),
        (["--room.own=mine.Ruler", "--room.own.init_args.fill=.nan"], r"^room\.own\.init_args: .*; give text, finite numbers, "),
        (["--room.own=mine.Ruler", "--room.own.init_args={a: [1, {b: -.inf}]}"], r"^room\.own\.init_args: .*; give text, finite numbers, "),
        (["--room.own="], r"^room\.own\.class_path: got ''; give an import path"),
        (["--room.own.init_args.a=3"], r"^room\.own\.init_args: got \{'a': 3\}; .*give class_path with them"),
        (["--room.own.init_arg.a=3"], r"^room\.own\.init_arg\.a: no such setting"),
        (["--room.own.init_args."], r"no such setting"),
        (["--room.size.init_args.a=3"], r"^room\.size\.init_args\.a: no such setting"),
        (["--room.own.init_args.a"], r"^room\.own\.init_args\.a: no value given"),
    ],
)
def test_settings_of_another_form_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parsed(*argv)


def test_a_class_in_the_working_directory_is_found_and_constructed(module: str) -> None:
    made = build_own(OwnClass(class_path=f"{module}.Ruler", init_args={"unit": "m"}), "room.own", length=3)
    assert (made.length, made.unit) == (3, "m")
    assert build_own(OwnClass(class_path=f"{module}.ruler", init_args={"length": 2}), "room.own").length == 2


def test_the_working_directory_takes_no_installed_modules_place(module: str, tmp_path: Path) -> None:
    (tmp_path / "colorsys.py").write_text("raise SystemExit")
    sys.modules.pop("colorsys", None)
    assert callable(find_class(OwnClass(class_path="colorsys.rgb_to_hsv", init_args={"r": 0, "g": 0, "b": 0}), "room.own"))


def refused(path: str, arguments: dict[str, Any], **ours: Any) -> str:
    with pytest.raises(ConfigError) as error:
        build_own(OwnClass(class_path=path, init_args=arguments), "room.own", **ours)
    message = str(error.value)
    assert "\n" not in message
    return message


def test_what_cannot_be_found_or_constructed_is_refused_in_one_message(module: str, tmp_path: Path) -> None:
    told = refused("no_such_package.metrics.Dists", {})
    assert told.startswith("room.own.class_path: got 'no_such_package.metrics.Dists'; there is no module no_such_package;")
    assert str(tmp_path) in told
    assert f"there is no module {module}.metrics" in refused(f"{module}.metrics.Dists", {})
    told = refused(f"{module}.Rular", {})
    assert "has no Rular (closest: Ruler" in told and f"{module}.py" in told
    assert "it is a int; give a class" in refused(f"{module}.NUMBER", {})
    told = refused(f"{module}.Ruler", {"lenght": 3})
    assert told.startswith("room.own.init_args: got {'lenght': 3}; ") and "takes (length: int, unit: str = 'cm')" in told
    assert "missing a required argument: 'length'" in refused(f"{module}.Ruler", {})
    assert "length is given by us" in refused(f"{module}.Ruler", {"length": 3}, length=4)
    told = refused(f"{module}.Ruler", {"length": -1})
    assert f"constructing {module}.Ruler(length=-1) raised ValueError: no such length ({module}.py, line 5)" in told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_library", "needs the module no_such_library, which is not installed"),
        ("x = 1\ny = (", r"raised SyntaxError: .* \(broken_.*\.py, line 2\)"),
        ("import sys\nsys.exit()", r"raised SystemExit \(broken_.*\.py, line 2\); put what it does as a command under `if __name__"),
        ("x = 1\nraise RuntimeError('no luck')", r"raised RuntimeError: no luck \(broken_.*\.py, line 2\)"),
    ],
)
def test_a_module_that_cannot_be_imported_is_refused_with_the_reason(module: str, tmp_path: Path, text: str, message: str) -> None:
    name = f"broken_{module}"
    (tmp_path / f"{name}.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        find_class(OwnClass(class_path=f"{name}.Thing"), "room.own")


def test_leaving_from_a_constructor_is_refused(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("import sys\ndef ruler():\n    sys.exit()\n")
    assert f"constructing {module}.ruler raised SystemExit ({module}.py, line 3)" in refused(f"{module}.ruler", {})


def test_the_command_itself_has_no_class() -> None:
    code = (
        "from autoencoder.runtime.own_class import OwnClass, find_class\nclass X: ...\n"
        "try:\n    find_class(OwnClass(class_path='__main__.X'), 'own')\nexcept ValueError as error:\n    print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True).stdout
    assert said.startswith("own.class_path: got '__main__.X'; __main__ is this command itself; give the name of the class's file")


def test_a_module_that_is_not_there_is_missed_before_torch_is_imported() -> None:
    code = (
        "import sys\nfrom autoencoder.runtime.own_class import OwnClass, find_class\n"
        "try:\n    find_class(OwnClass(class_path='no_such_package.A'), 'own')\nexcept ValueError:\n    sys.exit('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
