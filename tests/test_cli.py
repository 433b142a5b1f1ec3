"""The command line: precedence, types, errors in one message."""

import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from autoencoder.runtime import cli, config_file
from autoencoder.runtime.config_file import closest, dotted, plain, read_config, to_yaml
from autoencoder.runtime.errors import ConfigError, TrainingError, UsageError, require
from autoencoder.runtime.settings import words
from diffusion.command import COMMANDS
from diffusion.command import main as firststage

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    """A rate."""

    def __post_init__(self) -> None:
        require(self.rate >= 0, "rate", self.rate, "give 0 or more")


@dataclass(frozen=True, kw_only=True)
class Group:
    inner: Inner = field(default_factory=Inner)
    """Inner."""
    size: int = 4
    """A size."""
    mode: Literal["fast", "exact"] = "fast"
    """A mode."""
    pair: tuple[float, float] = (1.0, 2.0)
    """A pair."""
    widths: tuple[int, ...] | None = None
    """Widths."""
    names: list[str] = field(default_factory=list)
    """Names."""
    images: int | str = "1k"
    """Images."""
    text: str = "a"
    """Some text."""
    path: str | None = None
    """A path."""


@dataclass(frozen=True, kw_only=True)
class Config:
    out: str
    """Where to."""
    group: Group = field(default_factory=Group)
    """A group."""
    dry: bool = False
    """A switch."""

    def __post_init__(self) -> None:
        require(self.group.size != 13, "group.size", self.group.size, "give another number")


ONE_BY_ONE = "a group of settings; give them one by one (group.inner.rate, group.size, group.mode, ...), or leave it out"


def parse(*argv: str, stage: str | None = "autoencoder", positional: str | None = None) -> Config:
    return cli.parse(Config, list(argv), prog="firststage test", description="Test.", stage=stage, positional=positional)


def refusal(*argv: str) -> str:
    with pytest.raises(UsageError) as error:
        parse(*argv)
    return str(error.value)


@pytest.fixture
def file(tmp_path: Path) -> Any:
    def write(text: str, name: str = "c.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_the_command_line_wins_over_config_over_defaults_wherever_config_stands(file: Any) -> None:
    base = file("group: {size: 5, mode: exact, inner: {rate: 1e-3}}\nout: a")
    more = file("group: {size: 6}", "more.yaml")
    for argv in (["--config", base, "--group.size", "7"], ["--group.size=7", f"--config={base}"]):
        config = parse(*argv)
        assert config == Config(out="a", group=Group(size=7, mode="exact", inner=Inner(rate=0.001)))
    assert parse("--config", base, "--config", more).group.size == 6
    assert parse("--config", more, "--config", base).group.size == 5
    assert parse("--config", base, "--out", "b", "--out", "c").out == "c"


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("group.size", "32", 32),
        ("group.inner.rate", "1e-3", 0.001),
        ("group.pair", "[0.5, 1]", (0.5, 1.0)),
        ("group.widths", "[32, 64]", (32, 64)),
        ("group.widths", "null", None),
        ("group.names", "[a, b]", ["a", "b"]),
        ("group.names", "a,b", ["a", "b"]),
        ("group.names", "a", ["a"]),
        ("group.names", "[]", []),
        ("group.pair", "0.5,1", (0.5, 1.0)),
        ("group.widths", "32,64", (32, 64)),
        ("group.images", "20k", "20k"),
        ("group.images", "20", 20),
        ("group.text", "123", "123"),
        ("group.text", "a: b", "a: b"),
        ("group.path", "null", None),
        ("dry", "true", True),
        ("dry", "no", False),
    ],
)
def test_values_on_the_command_line_take_their_settings_types(key: str, given: str, value: object) -> None:
    flat = {**dotted(plain(parse("--out", "r", f"--{key}", given)))}
    assert flat[key] == plain(value)
    assert type(flat[key]) is type(plain(value))


def test_values_in_a_file_take_their_settings_types(file: Any) -> None:
    text = "group: {pair: [1, 2], widths: [3], images: 1e6, size: 64.0, path: null, inner: {rate: 2e-3}}\ngroup.text: '5'\ndry: true"
    config = parse("--out", "r", "--config", file(text))
    assert config == Config(out="r", dry=True, group=Group(widths=(3,), images=1_000_000, size=64, text="5", inner=Inner(rate=0.002)))
    assert isinstance(config.group.pair[0], float)
    assert parse("--out", "r", "--config", file("# nothing yet\n")) == Config(out="r")


def test_a_switch_needs_no_value() -> None:
    assert parse("--dry", "--out", "r").dry
    assert parse("--out", "r", "--dry").dry
    assert not parse("--out", "r", "--dry", "false").dry


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--group.size", "a"], "group.size: got 'a'; give an integer"),
        (["--group.size", "null"], "group.size: got 'null'; give an integer"),
        (["--group.size"], "group.size: no value given; give an integer"),
        (["--group.size", "--dry"], "group.size: no value given; give an integer"),
        (["--group.mode", "slow"], "group.mode: got 'slow'; give `fast` or `exact`"),
        (["--group.pair", "[1]"], "group.pair: got '[1]'; give a list of 2: a number, a number"),
        (["--group.widths", "[a]"], "group.widths: got '[a]'; give a list such as [1, 2], each an integer or `null`"),
        (["--group.pair", "1"], "group.pair: got '[1]'; give a list of 2: a number, a number"),
        (["--dry=maybe"], "dry: got 'maybe'; give `true` or `false`"),
        (["--group.inner.rate", "-1"], "group.inner.rate: got -1.0; give 0 or more"),
        (["--group.size", "13"], "group.size: got 13; give another number"),
        (["--group.sise", "3"], "group.sise: no such setting; closest: group.size"),
        (["--size", "3"], "size: no such setting; closest: group.size"),
        (["--group.siz", "3"], "group.siz: no such setting; closest: group.size"),
        (["--print-config"], "print-config: no such setting; closest: print_config"),
        (["--xyzzy", "3"], "xyzzy: no such setting; --help lists all"),
        (["-o", "3"], "-o: no such setting; --help lists all"),
        (["--group", "null"], f"group: {ONE_BY_ONE}"),
        (["stray"], "stray: an argument that belongs to no setting; give settings as --KEY VALUE"),
        (["--config"], "config: no value given; give the path of a YAML file or a shipped configuration's name"),
    ],
)
def test_a_wrong_command_line_is_one_message(argv: list[str], message: str) -> None:
    assert refusal("--out", "r", *argv) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group: {size: a}", "group.size: got 'a'; give an integer (in FILE)"),
        ("group: {size: null}", "group.size: not given; give an integer (in FILE)"),
        ("group: {size: {a: 1}}", "group.size: got {'a': 1}; give an integer (in FILE)"),
        ("group: {text: 3}", "group.text: got 3; give text (in quotes) (in FILE)"),
        ("group: {names: a}", "group.names: got 'a'; give a list such as [a, b], each text (in FILE)"),
        ("group: {inner: {rate: -1}}", "group.inner.rate: got -1.0; give 0 or more (in FILE)"),
        ("group: {sise: 1}", "group.sise: no such setting; closest: group.size (in FILE)"),
        ("1: 2", "1: no such setting; --help lists all (in FILE)"),
        ("group: null", f"group: {ONE_BY_ONE} (in FILE)"),
        ("group: {size: 1, size: 2}", "FILE, line 1: `size` is given twice; mend the YAML there"),
        ("group: {size: 1}\ngroup.size: 2", "FILE: `group.size` is given twice"),
        ("group:\n\tsize: 1", "FILE, line 2: found character '\\t' that cannot start any token; mend the YAML there"),
        ("group: [", "FILE, line 1: "),
        ("- 1", "FILE: holds a list; give a mapping of settings such as `data: {resolution: 64}`"),
        ("hello", "FILE: holds a str; give a mapping"),
    ],
)
def test_a_wrong_file_is_one_message_that_names_it(file: Any, text: str, message: str) -> None:
    path = file(text)
    assert refusal("--out", "r", "--config", path).startswith(message.replace("FILE", path))


def test_an_override_of_a_files_wrong_value_is_not_blamed_on_the_file(file: Any) -> None:
    assert refusal("--out", "r", "--config", file("group: {size: 1}"), "--group.size", "x") == "group.size: got 'x'; give an integer"


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not text in UTF-8" in refusal("--config", str(tmp_path / "c.yaml"))


def test_a_missing_required_setting_says_what_to_give() -> None:
    assert refusal() == "out: not given; give --out OUT (Where to.)"


def test_shipped_configurations_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    (package / "configs" / "autoencoder").mkdir(parents=True)
    (package / "configs" / "autoencoder" / "small.yaml").write_text("group: {size: 8}")
    monkeypatch.setattr(config_file, "_PACKAGE", package)
    assert parse("--out", "r", "--config", "small").group.size == 8
    assert refusal("--config", "smal") == (
        "config: got 'smal', no such file; give the path of a YAML file, or one of those that ship: small (closest: small)"
    )
    assert "a folder" in refusal("--config", str(tmp_path))
    with pytest.raises(UsageError) as error:
        parse("--config", "small", stage=None)
    assert str(error.value) == (
        "config: got 'small', no such file; give the path of a YAML file (the `small` that ships is for train_autoencoder)"
    )
    with pytest.raises(UsageError, match=r"^config: no value given; give the path of a YAML file$"):
        parse("--config", stage=None)


def test_every_shipped_configuration_is_valid() -> None:
    from autoencoder.config import TrainAutoencoderConfig
    from diffusion.config import TrainDiffusionConfig

    commands: tuple[tuple[str, type, list[str]], ...] = (
        ("autoencoder", TrainAutoencoderConfig, []),
        ("diffusion", TrainDiffusionConfig, ["--latents", "l"]),
    )
    for stage, config_class, argv in commands:
        shipped = config_file.shipped_configs(stage)
        assert "demo" in shipped
        for name in shipped:
            cli.parse(config_class, ["--config", name, *argv, "--out", "r"], prog="", description="", stage=stage)


def test_print_config_can_be_read_back(file: Any, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--group.text", "1e-3", "--group.inner.rate", "1e-05", "--group.widths", "[1,2]", "--group.images", "20k"]
    with pytest.raises(SystemExit) as done:
        parse("--out", "r", *given, "--print_config")
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert parse("--config", file(printed)) == parse("--out", "r", *given)
    assert printed == to_yaml(plain(parse("--out", "r", *given)))


def test_print_config_does_without_required_settings_but_checks_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--print_config")
    assert "out" not in yaml.safe_load(capsys.readouterr().out)
    assert refusal("--print_config", "--group.inner.rate", "-1") == "group.inner.rate: got -1.0; give 0 or more"


def test_positional_arguments_fill_their_setting() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Runs:
        runs: list[str]
        """Runs."""
        dry: bool = False
        """A switch."""

    def runs(*argv: str) -> Runs:
        return cli.parse(Runs, list(argv), prog="p", description="", positional="runs")

    assert runs("a", "--dry", "b") == Runs(runs=["a", "b"], dry=True)
    with pytest.raises(UsageError, match=r"runs: not given; give RUNS \.\.\."):
        runs("--dry")


def test_yaml_that_is_written_is_read_back_unchanged(tmp_path: Path) -> None:
    texts = {"a": "1e-3", "b": "null", "c": "20k", "d": "true", "e": "", "f": "a: b", "g": "β"}
    values = {"texts": texts, "numbers": {"a": [1, 2.5, None], "b": 1e-7}, "none": []}
    (tmp_path / "c.yaml").write_text(to_yaml(values), encoding="utf-8")
    assert read_config(tmp_path / "c.yaml") == values


def test_closest_names() -> None:
    known = ["optimizer.lr", "optimizer.muon_lr", "data.resolution", "train.batch_size"]
    assert closest("lr", known)[0] == "optimizer.lr"
    assert closest("batch-size", known) == ["train.batch_size"]
    assert closest("train.batchsize", known) == ["train.batch_size"]
    assert closest("bach_size", known) == ["train.batch_size"]
    assert closest("qqqq", known) == []


def test_types_in_words() -> None:
    assert words(float | None) == "a number or `null`"
    assert words(Literal[256, 65536]) == "`256` or `65536`"


def test_run_turns_errors_into_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def raises(error: BaseException) -> Any:
        def body() -> None:
            raise error

        return body

    assert cli.run(lambda: None) == 0
    assert cli.run(lambda: 143) == 143
    assert cli.run(raises(ConfigError("a.b", 1, "give 2"))) == 2
    assert capsys.readouterr().err == "error: a.b: got 1; give 2\n"
    assert cli.run(raises(TrainingError("no"))) == 1
    assert capsys.readouterr().err == "error: no\n"
    assert cli.run(raises(KeyboardInterrupt())) == 130
    with pytest.raises(ZeroDivisionError):
        cli.run(raises(ZeroDivisionError()))


def test_the_dispatcher_lists_commands_and_knows_near_names(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"]):
        assert firststage(argv) == 0
        shown = capsys.readouterr().out
        assert all(name in shown and what in shown for name, (_, what) in COMMANDS.items())
    assert firststage(["--version"]) == 0
    assert capsys.readouterr().out.startswith("firststage ")
    assert firststage(["train-autoencodr"]) == 2
    assert capsys.readouterr().err == "error: train-autoencodr: no such command; closest: train_autoencoder\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_setting_ends_each_command_with_code_2_and_one_message(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert firststage([command, "--no.such_setting", "1"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == "error: no.such_setting: no such setting; --help lists all\n"


# What `--help` may not load, seen from inside the process that prints it.
HELP = """
import sys
sys.argv = ["firststage", {command!r}, "--help"]
from diffusion.command import main
try:
    main()
finally:
    heavy = sorted({{"torch", "numpy", "datasets", "diffusers", "accelerate", "matplotlib"}} & set(sys.modules))
    print("heavy:", heavy, file=sys.stderr)
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_help_comes_without_torch(command: str) -> None:
    done = subprocess.run([sys.executable, "-c", HELP.format(command=command)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: firststage {command}" in done.stdout
    assert "--config" in done.stdout
    assert ("one that ships" in done.stdout.replace("\n", " ")) == (command in config_file.COMMANDS.values())
    assert done.stderr == "heavy: []\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_each_script_in_a_subprocess_refuses_with_code_2_and_no_traceback(command: str, tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "scripts" / f"{command}.py"), "--config", "nowhere.yaml"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: config: got 'nowhere.yaml', no such file")
    assert done.stderr.count("\n") == 1
