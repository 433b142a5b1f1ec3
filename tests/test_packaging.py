"""What the project consists of: layers, what imports stay light, package data, constraints."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from diffusion.command import COMMANDS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def imported(file: Path) -> Iterator[str]:
    """Absolute names of all modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "" if node.level == 0 else ".relative"


def test_the_tests_that_docs_name_exist() -> None:
    named = {name for page in (ROOT / "docs").glob("*.md") for name in re.findall(r"(test_\w+\.py)::(test_\w+)", page.read_text())}
    assert named
    missing = [name for name in named if f"def {name[1]}(" not in (ROOT / "tests" / name[0]).read_text()]
    assert not missing


def test_links_between_pages_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_docs_list_every_configuration_that_ships() -> None:
    listed = re.search(r"name of one that ships: ([^)]*)\)", (ROOT / "docs" / "training.md").read_text())
    assert listed is not None
    assert set(re.findall(r"`([^`]+)`", listed[1])) == {file.stem for file in (ROOT / "configs" / "autoencoder").glob("*.yaml")}


@pytest.mark.parametrize(("room", "forbidden"), [("autoencoder", {"diffusion", "scripts"}), ("diffusion", {"scripts"})])
def test_layers_point_one_way(room: str, forbidden: set[str]) -> None:
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        roots = {name.split(".")[0] for name in imported(file)}
        assert not roots & (forbidden | {"tests", "benchmarks", ""}), file


def test_scripts_are_thin_and_there_is_one_for_each_command() -> None:
    files = {file.stem: file for file in (ROOT / "scripts").glob("*.py")}
    assert files.keys() == COMMANDS.keys()
    for file in files.values():
        assert set(imported(file)) == {"sys", "pathlib", "diffusion.command"}


@pytest.mark.parametrize("module", ["autoencoder", "diffusion", "autoencoder.config", "diffusion.command", "autoencoder.runtime.cli"])
def test_what_the_command_line_needs_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_names_that_packages_offer_exist() -> None:
    for package in ("autoencoder", "diffusion"):
        tree = ast.parse((ROOT / package / "__init__.py").read_text())
        offered = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__")
        assert all((ROOT / package / f"{name}.py").is_file() for name in offered)


def requirements() -> list[str]:
    project = PROJECT["project"]
    return [*project["dependencies"], *project["optional-dependencies"]["dev"]]


def canonical(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def test_constraints_name_exactly_the_direct_dependencies_with_one_version_each() -> None:
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    assert {canonical(name) for name in pinned} == {canonical(requirement) for requirement in requirements()}
    assert pinned["torch"] == "2.13.0"


def test_every_third_party_import_is_a_declared_dependency() -> None:
    distributions = metadata.packages_distributions()
    declared = {canonical(requirement) for requirement in PROJECT["project"]["dependencies"]}
    for room in ("autoencoder", "diffusion"):
        for file in (ROOT / room).rglob("*.py"):
            for name in {name.split(".")[0] for name in imported(file)} - set(sys.stdlib_module_names) - {"autoencoder", "diffusion"}:
                owners = {canonical(owner) for owner in distributions.get(name, [name])}
                assert owners & declared, f"{file} imports {name}"


def test_the_wheel_holds_both_packages_with_their_data_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("firststage-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
        extracted = tmp_path / "installed"
        archive.extractall(extracted)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"autoencoder", "diffusion", "firststage"}
    assert "firststage = diffusion.command:main" in entry_points
    for config in (ROOT / "configs").rglob("*.yaml"):
        assert f"autoencoder/{config.relative_to(ROOT)}" in names
    for data in [*(ROOT / "autoencoder").rglob("*.css"), *(ROOT / "autoencoder").rglob("*.jinja")]:
        assert str(data.relative_to(ROOT)) in names

    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from diffusion.command import main; sys.exit(main(sys.argv[1:]))"
    line = [sys.executable, "-P", "-c", code, str(extracted), "train_autoencoder", "--config", "demo", "--print_config"]
    printed = subprocess.run(line, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "preset: tiny" in printed
