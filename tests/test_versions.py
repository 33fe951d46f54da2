"""The environment: pyproject.toml, constraints.txt and env.yaml agree."""

import ast
import importlib.metadata
import itertools
import re
import sys
import tomllib
from typing import cast

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import tokenmixup
from experiments.provenance import ROOT

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PYTHONS = ("3.11", "3.12", "3.13")


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.lstrip().startswith("#")]


def pins_for(python: str) -> dict[str, Version]:
    """The versions in constraints.txt for Linux and a version of Python."""
    environment: dict[str, str] = {
        **cast(dict[str, str], default_environment()),
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "python_version": python,
        "python_full_version": f"{python}.0",
    }
    found: dict[str, Version] = {}
    for pin in pins():
        if pin.marker is None or pin.marker.evaluate(environment):
            name = canonicalize_name(pin.name)
            assert name not in found, f"two pins of {name} under Python {python}"
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            found[name] = Version(specifier.version)
    return found


def demands() -> list[Requirement]:
    """Every requirement in pyproject.toml, including that of the build."""
    extras = itertools.chain(*PROJECT["optional-dependencies"].values())
    needed = [*PYPROJECT["build-system"]["requires"], *PROJECT["dependencies"], *extras]
    return [Requirement(text) for text in needed]


@pytest.mark.parametrize(
    "folder, extras",
    [
        ("tokenmixup", ()),
        ("experiments", ("experiments",)),
        ("benchmarks", ("experiments", "test")),
        ("tests", ("experiments", "test")),
    ],
)
def test_every_imported_package_is_declared(folder: str, extras: tuple[str, ...]) -> None:
    """A package that is there only because another one needs it may disappear."""
    named = list(PROJECT["dependencies"])
    named += itertools.chain(*(PROJECT["optional-dependencies"][extra] for extra in extras))
    declared = {canonicalize_name(Requirement(text).name) for text in named}
    own = {"tokenmixup", "experiments", "benchmarks", "tests"}
    if folder == "tokenmixup":
        # a user with such a host has its library, and transformers brings safetensors
        own |= {"timm", "torchvision", "transformers", "safetensors"}
    if folder == "tests":
        own |= {"triton"}  # torch's CUDA builds bring it; what needs it is skipped without
    providers = importlib.metadata.packages_distributions()
    for path in (ROOT / folder).rglob("*.py"):
        imported: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").partition(".")[0])
        for name in imported - own - sys.stdlib_module_names:
            packages = {canonicalize_name(package) for package in providers.get(name, [])}
            assert packages & declared, f"{path}: {name} comes from {packages or 'nowhere'}"


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_has_a_pin_in_its_range(python: str) -> None:
    found = pins_for(python)
    for demand in demands():
        name = canonicalize_name(demand.name)
        assert name in found, f"constraints.txt has no pin of {name}; see CONTRIBUTING.md"
        assert found[name] in demand.specifier, f"{name} {found[name]}: {demand.specifier}"


def test_the_oldest_versions_that_are_tested_are_those_that_are_claimed() -> None:
    script = (ROOT / "run" / "versions.sh").read_text()
    line = re.search(r"oldest\) echo (.*) ;;", script)
    assert line is not None
    python, *packages = line[1].split()
    assert PROJECT["requires-python"] == f">={python}"
    claimed = {demand.name: demand.specifier for demand in demands()}
    for package in map(Requirement, packages):
        (bound,) = claimed[package.name]
        (tested,) = package.specifier
        assert (bound.operator, tested.operator) == (">=", "==")
        assert Version(bound.version) == Version(tested.version)


def test_constraints_contain_only_versions() -> None:
    text = (ROOT / "constraints.txt").read_text()
    command = re.search(r"^# +uv (pip compile .*) -o constraints\.txt$", text, re.MULTILINE)
    assert command is not None, "its first lines name the command that made it"
    assert command[1] in (ROOT / "CONTRIBUTING.md").read_text()
    assert not re.search(r"://|^ *-|--hash|\\$|@", text, re.MULTILINE)
    assert all(not pin.extras and pin.url is None for pin in pins())


def test_conda_gets_the_same_versions() -> None:
    dependencies = yaml.safe_load((ROOT / "env.yaml").read_text())["dependencies"]
    (pip,) = (entry["pip"] for entry in dependencies if isinstance(entry, dict))
    extras = ",".join(PROJECT["optional-dependencies"])
    assert pip == ["-c constraints.txt", f"-e .[{extras}]"]
    conda = {r.name: r for r in (Requirement(e) for e in dependencies if isinstance(e, str))}
    assert set(conda) == {"python", "pip"}, "pip installs everything else, at the same versions"
    allowed = [f"3.{minor}" for minor in range(20) if f"3.{minor}.5" in conda["python"].specifier]
    assert tuple(allowed) == PYTHONS


def test_the_same_pythons_are_supported_everywhere() -> None:
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
    prefix = "Programming Language :: Python :: "
    named = [c.removeprefix(prefix) for c in PROJECT["classifiers"] if c.startswith(prefix)]
    assert tuple(named) == PYTHONS


def test_the_version_is_the_same_everywhere() -> None:
    version = PROJECT["version"]
    assert tokenmixup.__version__ == version
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def test_only_the_library_is_installed_with_its_types() -> None:
    packages = PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert packages == ["tokenmixup", "tokenmixup.*"]
    assert (ROOT / "tokenmixup" / "py.typed").is_file()
    light = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    assert light == {"torch", "numpy", "lapx"}
