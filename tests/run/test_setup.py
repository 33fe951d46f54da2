"""run/setup.sh, which makes the environment, in small checkouts with an index of empty packages.

uv and Python are real; only the test marked slow uses the network.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import uv

from experiments.provenance import ROOT
from tests.helpers.wheels import write_wheel

PYTHON = os.path.realpath(sys.executable)

PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "tokenmixup"
version = "0.1.0"
[project.optional-dependencies]
experiments = ["torch", "torchvision"]
test = ["timm"]
docs = ["uv"]
"""
BACKEND = """
from tests.helpers.wheels import write_wheel
def build_editable(folder, settings=None, metadata=None):
    return write_wheel(folder, "tokenmixup", "0.1.0").name
"""
CONSTRAINTS = "torch==1.0\ntorchvision==1.0\ntimm==1.0\nuv==1.0\n"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index in `simple`, and local wheels, with another build of torch, in `wheels`."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "wheels").mkdir()
    script = f'#!/bin/sh\nexec "{uv.find_uv_bin()}" "$@"\n'
    for name in ("torch", "torchvision", "timm", "uv"):
        index = folder / "simple" / name
        index.mkdir(parents=True)
        good = write_wheel(index, name, "1.0", script=script if name == "uv" else "")
        shutil.copy(good, folder / "wheels")
        bad = write_wheel(index, name, "2.0", code="raise ImportError('broken')")
        links = [f'<a href="{wheel.name}">{wheel.name}</a>' for wheel in (good, bad)]
        (index / "index.html").write_text("".join(links))
    write_wheel(folder / "wheels", "torch", "1.0+cpu")
    return folder


class Checkout:
    """A checkout with what run/setup.sh reads, and a PATH with little more than it calls."""

    def __init__(self, folder: Path, packages: Path) -> None:
        self.root = folder / "a check out"
        self.tools = folder / "tools"
        for path in (self.root / "run", self.root / "tokenmixup", self.tools):
            path.mkdir(parents=True)
        shutil.copy(ROOT / "run" / "setup.sh", self.root / "run")
        self.write("pyproject.toml", PROJECT)
        self.write("setup.py", "import setuptools\n\nsetuptools.setup()\n")
        self.write("constraints.txt", CONSTRAINTS)
        self.write("backend.py", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{BACKEND}")
        self.write("tokenmixup/solver.c", "")
        for tool in (
            *("bash", "cat", "comm", "dirname", "env", "flock", "mktemp", "mv", "rm"),
            *("sh", "sha256sum", "sort"),
        ):
            path = shutil.which(tool)
            assert path is not None, f"no {tool} on this machine"
            (self.tools / tool).symlink_to(path)
        self.environment = {
            "PATH": str(self.tools),
            "HOME": str(folder),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": (packages / "simple").as_uri(),
            "UV_CACHE_DIR": str(packages / "cache"),
            "UV_PYTHON_DOWNLOADS": "never",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }
        self.add_tool("python3", f'exec "{PYTHON}" "$@"')
        self.add_tool("uv", f'exec "{uv.find_uv_bin()}" "$@"')

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    def add_tool(self, name: str, text: str) -> Path:
        path = self.tools / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return path

    def start(self, *command: str | Path, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(word) for word in command or ("bash", self.root / "run" / "setup.sh")],
            env={**self.environment, **more},
            cwd=self.tools,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def setup(self, *command: str | Path, status: int = 0, **more: str) -> str:
        process = self.start(*command, **more)
        said, _ = process.communicate(timeout=120)
        assert process.returncode == status, said
        return said

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    def installed(self) -> list[str]:
        """The packages in the environment, without the project."""
        found = self.venv.glob("lib/python3.*/site-packages/*.dist-info")
        names = sorted(path.name.removesuffix(".dist-info") for path in found)
        return [name for name in names if not name.startswith("tokenmixup")]

    def package(self, name: str) -> Path:
        (found,) = self.venv.glob(f"lib/python3.*/site-packages/{name}-*.dist-info")
        return found


RIGHT = ["timm-1.0", "torch-1.0", "torchvision-1.0", "uv-1.0"]


@pytest.fixture
def checkout(tmp_path: Path, packages: Path) -> Checkout:
    """A checkout on a machine with uv and a Python, where nothing is installed yet."""
    return Checkout(tmp_path, packages)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, packages: Path) -> Checkout:
    return Checkout(tmp_path_factory.mktemp("shared"), packages)


@pytest.fixture
def ready(shared: Checkout) -> Checkout:
    """A checkout whose environment is right. Tests share it: to make one takes a second."""
    shared.environment.pop("PYTHON", None)
    shared.setup()
    return shared


@pytest.mark.parametrize(
    "tool", ["uv", *(pytest.param(tool, marks=pytest.mark.slow) for tool in ("pip", "venv"))]
)
def test_one_tool_suffices_and_a_second_call_does_nothing(checkout: Checkout, tool: str) -> None:
    if tool != "uv":
        (checkout.tools / "uv").unlink()
    if tool == "venv":
        checkout.add_tool("python3", f'[ "$2" != pip ] || exit 1; exec "{PYTHON}" "$@"')
    assert "making" in checkout.setup()
    assert checkout.installed() == RIGHT
    (checkout.venv / "left over").touch()
    assert checkout.setup() == f"setup: {checkout.venv} is ready\n"
    assert (checkout.venv / "left over").exists()


def break_python(checkout: Checkout) -> None:
    (checkout.venv / "bin/python").unlink()
    (checkout.venv / "bin/python").symlink_to("/nowhere/python3")


def move(checkout: Checkout) -> None:
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))


def ask_for_another_python(checkout: Checkout) -> None:
    lying = f'[ "$1" != --version ] || exec echo Python 3.12.99; exec "{PYTHON}" "$@"'
    checkout.environment["PYTHON"] = str(checkout.add_tool("other", lying))


def append_to(name: str) -> Callable[[Checkout], None]:
    return lambda checkout: checkout.write(name, (checkout.root / name).read_text() + "# more\n")


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(append_to("pyproject.toml"), id="project"),
        pytest.param(append_to("setup.py"), id="build"),
        pytest.param(append_to("tokenmixup/solver.c"), id="C source"),
        pytest.param(lambda checkout: (checkout.venv / "complete").unlink(), id="half made"),
        pytest.param(
            lambda checkout: checkout.package("torch").rename(
                checkout.package("torch").with_name("torch-1.1.dist-info")
            ),
            id="other torch",
        ),
        break_python,
        move,
        ask_for_another_python,
    ],
)
def test_a_wrong_environment_is_made_anew(
    ready: Checkout, spoil: Callable[[Checkout], None]
) -> None:
    spoil(ready)
    (ready.venv / "left over").touch()
    ready.setup()
    assert not (ready.venv / "left over").exists()
    assert ready.installed() == RIGHT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("version", "message"),
    [("9.0", "the installation stopped"), ("2.0", "torch, torchvision and timm do not load")],
)
def test_a_failed_installation_starts_over(checkout: Checkout, version: str, message: str) -> None:
    checkout.write("constraints.txt", CONSTRAINTS.replace("timm==1.0", f"timm=={version}"))
    assert message in checkout.setup(status=1).splitlines()[-1]
    assert message in checkout.setup(status=1).splitlines()[-1]
    checkout.write("constraints.txt", CONSTRAINTS)
    checkout.setup()
    assert checkout.installed() == RIGHT


def test_packages_added_by_hand_stay(ready: Checkout) -> None:
    added = ready.package("torch").with_name("more-1.0.dist-info")
    shutil.copytree(ready.package("torch"), added)
    (added / "METADATA").write_text("Metadata-Version: 2.1\nName: more\nVersion: 1.0\n")
    assert "making" not in ready.setup()


def test_other_environments_and_local_wheels_do_not_matter(
    checkout: Checkout, packages: Path
) -> None:
    script = os.path.relpath(checkout.root / "run" / "setup.sh", checkout.tools)
    checkout.setup(
        "sh",
        script,
        VIRTUAL_ENV="/other/environment",
        CONDA_PREFIX="/other/conda",
        PYTHONPATH="/other/packages",
        PYTHONHOME="/other",
        PIP_FIND_LINKS=str(packages / "wheels"),
        PIP_USER="1",
        UV_FIND_LINKS=str(packages / "wheels"),
        UV_PYTHON="/other/python",
        CDPATH="/",
    )
    assert checkout.installed() == RIGHT


def test_local_wheels_are_taken_where_there_is_no_index(checkout: Checkout, packages: Path) -> None:
    checkout.setup(UV_NO_INDEX="1", UV_FIND_LINKS=str(packages / "wheels"))
    assert "torch-1.0+cpu" in checkout.installed()


@pytest.mark.slow
def test_two_calls_at_once_install_once(checkout: Checkout) -> None:
    running = [checkout.start() for _ in range(2)]
    said = [process.communicate(timeout=120)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert sum("making" in text for text in said) == 1
    assert checkout.installed() == RIGHT


def test_what_is_missing_is_named(checkout: Checkout) -> None:
    for tool in ("uv", "python3"):
        (checkout.tools / tool).unlink()
    assert "found neither uv nor a Python with pip or venv" in checkout.setup(status=1)
    assert not checkout.venv.exists()


def test_a_wrong_python_is_named_and_removes_nothing(ready: Checkout) -> None:
    said = ready.setup(status=1, PYTHON="/no/python")
    assert "PYTHON=/no/python is not a Python 3.11 or newer" in said.splitlines()[-1]
    assert (ready.venv / "complete").exists()


@pytest.mark.slow
def test_a_fresh_clone_sets_itself_up(tmp_path: Path) -> None:
    clone = tmp_path / "fresh clone"
    environment = {**os.environ, "PYTHONPATH": ""}
    try:
        for command in (
            ("git", "clone", "--quiet", ROOT, clone),
            ("bash", clone / "run" / "setup.sh"),
            ("bash", clone / "run" / "test.sh", "-q", "tests/test_architecture.py"),
        ):
            subprocess.run(command, check=True, env=environment, timeout=900)
        program = "import tokenmixup; print(tokenmixup.__file__)"
        done = subprocess.run(
            [clone / ".venv/bin/python", "-I", "-c", program], capture_output=True, text=True
        )
        assert done.stdout.strip() == str(clone / "tokenmixup" / "__init__.py")
    finally:
        shutil.rmtree(clone, ignore_errors=True)  # 5 GB that pytest would keep
