"""The scripts of run/ and .ci/, first of all run/setup.sh, which makes the environment.

It runs here against a stand-in for Python (`fake_python.sh`) in a checkout of its own; only the
test marked slow installs anything.
"""

import os
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = sorted([*(ROOT / "run").glob("*.sh"), ROOT / ".ci" / "run"])


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command; give its status and all that it said."""
    return subprocess.run(
        [str(word) for word in command],
        env=environment or None,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


# --- run/setup.sh ---------------------------------------------------------------------------------


class Checkout:
    """A checkout that holds what run/setup.sh reads, and a PATH with a stand-in for Python."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a check out"
        self.tools = folder / "tools"
        self.log = folder / "log"
        (self.root / "run").mkdir(parents=True)
        self.tools.mkdir()
        for name in ("pyproject.toml", "constraints.txt", "run/setup.sh"):
            shutil.copy(ROOT / name, self.root / name)
        for tool in (
            *("bash", "cat", "cp", "dirname", "env", "flock", "grep", "head", "mkdir", "mv", "rm"),
            *("sh", "sha256sum", "sleep", "tail", "touch"),
        ):
            path = shutil.which(tool)
            assert path is not None, f"no {tool} on this machine"
            (self.tools / tool).symlink_to(path)

    def add_python(self, name: str) -> Path:
        return Path(shutil.copy(ROOT / "tests" / "fake_python.sh", self.tools / name))

    def environment(self, **more: str) -> dict[str, str]:
        return {"PATH": str(self.tools), "FAKE_LOG": str(self.log), **more}

    def setup(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        self.log.unlink(missing_ok=True)
        return run("bash", self.root / "run" / "setup.sh", *arguments, **self.environment(**more))

    @property
    def steps(self) -> list[str]:
        """What the last set-up asked Python to do; "uv 0" is uv without surprising variables."""
        return self.log.read_text().splitlines() if self.log.exists() else []

    @property
    def venv(self) -> Path:
        return self.root / ".venv"


ALL_STEPS = ["venv", "pip", "uv 0", "import"]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A checkout where a Python is found and nothing is installed yet."""
    made = Checkout(tmp_path)
    made.add_python("python3")
    return made


@pytest.fixture
def ready(checkout: Checkout) -> Checkout:
    """A checkout whose environment is right."""
    result = checkout.setup()
    assert result.returncode == 0, result.stdout
    assert checkout.steps == ALL_STEPS
    return checkout


def test_setup_does_nothing_when_the_environment_is_right(ready: Checkout) -> None:
    result = ready.setup()
    assert result.returncode == 0, result.stdout
    assert ready.steps == []
    assert ready.setup("--check").returncode == 0


def remove_package(checkout: Checkout) -> None:
    shutil.rmtree(checkout.venv / "lib/python3.11/site-packages/torch-1.0.dist-info")


def replace_package(checkout: Checkout) -> None:
    site = checkout.venv / "lib/python3.11/site-packages"
    (site / "torch-1.0.dist-info").rename(site / "torch-1.0+cpu.dist-info")


def break_python(checkout: Checkout) -> None:
    python = checkout.venv / "bin/python"
    python.unlink()
    python.symlink_to("/nowhere/python3")


def move(checkout: Checkout) -> None:
    checkout.root = checkout.root.rename(checkout.root.with_name("moved"))


def leave_half(checkout: Checkout) -> None:
    shutil.rmtree(checkout.venv)
    (checkout.venv / "bin").mkdir(parents=True)


def append(name: str) -> Callable[[Checkout], None]:
    def change(checkout: Checkout) -> None:
        with (checkout.root / name).open("a") as file:
            file.write("# changed\n")

    change.__name__ = f"change_{name}"
    return change


@pytest.mark.parametrize(
    "spoil",
    [
        append("pyproject.toml"),
        append("constraints.txt"),
        append("run/setup.sh"),
        break_python,
        leave_half,
        move,
        remove_package,
        replace_package,
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_setup_makes_a_wrong_environment_anew(
    ready: Checkout, spoil: Callable[[Checkout], None]
) -> None:
    spoil(ready)
    if ready.venv.exists():
        (ready.venv / "left over").touch()
    assert ready.setup("--check").returncode == 1
    assert ready.steps == []
    result = ready.setup()
    assert result.returncode == 0, result.stdout
    assert ready.steps == ALL_STEPS
    assert not (ready.venv / "left over").exists()


@pytest.mark.parametrize("step", ["venv", "pip", "uv", "import"])
def test_setup_that_failed_starts_anew(checkout: Checkout, step: str) -> None:
    result = checkout.setup(FAKE_FAILS=step)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] != f"setup: {checkout.venv} is ready"
    assert checkout.setup("--check").returncode == 1
    assert checkout.setup().returncode == 0
    assert checkout.steps == ALL_STEPS


def test_setup_keeps_packages_added_by_hand(ready: Checkout) -> None:
    (ready.venv / "lib/python3.11/site-packages/more-1.0.dist-info").mkdir()
    assert ready.setup().returncode == 0
    assert ready.steps == []


def test_setup_for_another_python_starts_anew(ready: Checkout) -> None:
    other = str(ready.add_python("other"))
    assert ready.setup(PYTHON=other).returncode == 0
    assert ready.steps == [], "the same version: nothing to do"
    # The stand-in takes its version from outside, so the environment's own changes along with it.
    assert ready.setup(PYTHON=other, FAKE_VERSION="3.12").returncode == 0
    assert ready.steps == ALL_STEPS


def test_setup_is_not_led_astray_by_its_surroundings(checkout: Checkout) -> None:
    result = checkout.setup(
        VIRTUAL_ENV="/other/environment",
        CONDA_PREFIX="/other/conda",
        PYTHONPATH="/other/packages",
        PYTHONHOME="/other",
        PIP_FIND_LINKS="/other/wheels",
        PIP_USER="1",
        UV_FIND_LINKS="/other/wheels",
        UV_PYTHON="/other/python",
        CDPATH="/",
    )
    assert result.returncode == 0, result.stdout
    assert checkout.steps == ALL_STEPS


def test_setup_twice_at_once_installs_once(checkout: Checkout) -> None:
    command = ["bash", str(checkout.root / "run" / "setup.sh")]
    environment = checkout.environment(FAKE_SECONDS="1")
    running = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE) for _ in "12"]
    said = [process.communicate(timeout=60)[1].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0], said
    assert checkout.steps == ALL_STEPS
    assert sum("waiting" in text for text in said) == 1


def test_setup_leaves_the_calling_shell_alone(ready: Checkout) -> None:
    script = f'cd /; . "{ready.root}/run/setup.sh"; false; echo "$PWD $PYTHONPATH"'
    result = run("bash", "-c", script, **ready.environment(PYTHONPATH="kept"))
    assert result.stdout.splitlines()[-1] == "/ kept"


def test_setup_runs_under_sh_too(ready: Checkout) -> None:
    assert run("sh", ready.root / "run/setup.sh", **ready.environment()).returncode == 0


def test_setup_names_what_is_missing(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)

    def message(*arguments: str, **more: str) -> str:
        result = checkout.setup(*arguments, **more)
        assert result.returncode == 1
        assert not checkout.venv.exists()
        assert checkout.steps == []
        assert len(result.stdout.splitlines()) == 1
        return result.stdout

    assert re.search(r"no Python 3\.11 or newer found.*PYTHON=", message())
    checkout.add_python("python3")
    assert "Python 3.9.1" in message(FAKE_VERSION="3.9")
    assert "apt install python3.12-venv" in message(FAKE_NO_VENV="1", FAKE_VERSION="3.12")
    assert "PYTHON=/no/python is not" in message(PYTHON="/no/python")
    assert "unknown argument --all" in message("--all")


def test_setup_prefers_the_named_then_the_newest_tested_python(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    names = ["python3", "python3.11", "python3.13"]
    pythons = [checkout.add_python(name) for name in names]
    assert f"with {pythons[2]} " in checkout.setup().stdout
    leave_half(checkout)
    assert f"with {pythons[0]} " in checkout.setup(PYTHON="python3").stdout


def test_setup_is_quick_when_there_is_nothing_to_do() -> None:
    script = ROOT / "run" / "setup.sh"
    if run("bash", script, "--check").returncode != 0:
        pytest.skip("these tests run in an environment that run/setup.sh did not make")
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert run("bash", script).returncode == 0
        seconds.append(time.perf_counter() - start)
    assert statistics.median(seconds) < 2


def test_quickstart_trains_evaluates_and_compares(ready: Checkout) -> None:
    def quickstart(*arguments: str, **more: str) -> tuple[int, str, list[str]]:
        ready.log.unlink(missing_ok=True)
        script = ready.root / "run" / "quickstart.sh"
        result = run("bash", script, *arguments, **ready.environment(**more))
        return result.returncode, result.stdout, ready.steps

    shutil.copy(ROOT / "run" / "quickstart.sh", ready.root / "run")
    output = "output/quickstart"
    names = ["digits_baseline", "digits_HTM", "digits_VTM", "digits_HVTM"]
    more = ["--schedule.epochs", "1 2"]
    status, said, steps = quickstart(*more)
    assert status == 0, said
    expected = []
    for name in names:
        config = f"--config configs/{name}.yaml"
        weights = f"--checkpoint {output}/{name}/final.safetensors"
        expected += [
            f"-m experiments.train {config} --output {output}/{name} {' '.join(more)}",
            f"-m experiments.evaluate {config} {weights} {' '.join(more)}",
        ]
    runs = " ".join(f"{output}/{name}" for name in names)
    expected += [f"-m experiments.visualize --compare {runs} --out {output}"]
    assert steps == expected

    kept = ready.root / output / names[0] / "kept"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert quickstart()[0] == 0
    assert kept.exists()
    status, said, steps = quickstart("--fresh", FAKE_FAILS="experiments.train")
    assert not kept.exists()
    assert status == 1
    assert "goes on from here" in said.splitlines()[-1]
    assert len(steps) == 1, "nothing runs after a failure"


def test_the_figures_of_the_documents_are_made_anew(ready: Checkout) -> None:
    shutil.copy(ROOT / "run" / "figures.sh", ready.root / "run")
    made = ready.root / "output" / "figures"
    made.mkdir(parents=True)
    for name in ("htm_layer1.png", "htm_layer1.svg", "tokenmixup.gif"):
        (made / name).write_text(name)
    ready.log.unlink(missing_ok=True)
    result = run("bash", ready.root / "run" / "figures.sh", **ready.environment())
    assert result.returncode == 0, result.stderr
    runs = [f"digits_{name}_seed{seed}" for name in ("HVTM", "baseline") for seed in (42, 1, 2)]
    for step, name in zip(ready.steps, runs, strict=False):
        variant, seed = name.removeprefix("digits_").split("_seed")
        config = f"--config configs/digits_{variant}.yaml --seed {seed}"
        assert step == f"-m experiments.train {config} --output output/figures/{name}"
    curves, images = ready.steps[6:]
    assert "--checkpoint output/figures/digits_HVTM_seed42/final.safetensors" in images
    assert f"--compare {' '.join(f'output/figures/{name}' for name in runs)}" in curves
    copied = sorted(path.name for path in (ready.root / "docs" / "figures").iterdir())
    assert copied == ["htm_layer1.png", "tokenmixup.gif"]


@pytest.mark.slow
def test_a_fresh_clone_sets_itself_up(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    clone = tmp_path / "fresh clone"
    assert run("git", "clone", "--quiet", ROOT, clone).returncode == 0
    try:
        result = run("bash", clone / "run" / "setup.sh")
        assert result.returncode == 0, result.stdout
        result = run("bash", clone / "run" / "test.sh", "-q", "tests/test_architecture.py")
        assert result.returncode == 0, result.stdout
        program = "import tokenmixup; print(tokenmixup.__file__)"
        result = run(clone / ".venv/bin/python", "-I", "-c", program)
        assert result.stdout.strip() == str(clone / "tokenmixup" / "__init__.py")
    finally:
        shutil.rmtree(clone, ignore_errors=True)  # 5 GB that pytest would keep


# --- the scripts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_well_formed(script: Path) -> None:
    first = script.read_text().splitlines()[0]
    if first.startswith("#!"):
        assert first in ("#!/usr/bin/env bash", "#!/bin/sh", "#!/usr/bin/env sh")
        shell = "bash" if first.endswith("bash") else "sh"
        assert os.access(script, os.X_OK), f"chmod +x {script}"
    else:
        shell = "sh"
        others = [other.read_text() for other in SCRIPTS if other != script]
        sourced = re.compile(rf"^\s*\. .*{re.escape(script.name)}", re.MULTILINE)
        assert any(sourced.search(text) for text in others), "neither a program nor sourced by one"
    result = run(shell, "-n", script)
    assert result.returncode == 0, result.stdout
