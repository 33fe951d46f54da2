"""The scripts of run/ and .ci/: each is well formed, and what quickstart.sh and figures.sh run."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments.provenance import ROOT

SCRIPTS = sorted([*(ROOT / "run").glob("*.sh"), ROOT / ".ci" / "run"])

PYTHON = """#!/bin/sh
# Notes its arguments; those that contain FAIL end in an error.
printf '%s\\n' "$*" >> steps
case "$*" in *"${FAIL:-nothing}"*) exit 1 ;; esac
"""


class Checkout:
    """A checkout where set-up does nothing and Python only notes its arguments."""

    def __init__(self, root: Path, script: str) -> None:
        self.root, self.script = root, root / "run" / script
        for file, text in (("run/setup.sh", ""), (".venv/bin/python", PYTHON)):
            path = root / file
            path.parent.mkdir(parents=True)
            path.write_text(text)
            path.chmod(0o755)
        shutil.copy(ROOT / "run" / script, self.script)

    def run(self, *arguments: str, **more: str) -> tuple[int, str, list[str]]:
        """Exit status, output and the arguments of each call of Python."""
        steps = self.root / "steps"
        steps.unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(self.script), *arguments],
            env={**os.environ, **more},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout, steps.read_text().splitlines()


def test_quickstart_trains_draws_and_compares(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, "quickstart.sh")
    output = "output/quickstart"
    status, said, steps = checkout.run("--schedule.epochs", "1 2")
    assert status == 0, said
    study = (
        "-m experiments.study --study configs/studies/digits.yaml --seed 1 --jobs 2 "
        f"--output {output} --results {output}/results"
    )
    runs = [f"{output}/digits/{name}/seed1" for name in ("plain", "HTM", "VTM", "HTM-VTM")]
    assert steps == [
        f"{study} --only plain, HTM + VTM --schedule.epochs 1 2",
        "-m experiments.visualize --config configs/digits_HVTM.yaml "
        f"--checkpoint {runs[-1]}/final.safetensors --out {output}/pictures",
        f"{study} --schedule.epochs 1 2",
        f"-m experiments.visualize --compare {' '.join(runs)} --out {output}/comparison",
    ]

    kept = checkout.root / runs[0] / "kept"
    kept.parent.mkdir(parents=True)
    kept.touch()
    assert checkout.run()[0] == 0
    assert kept.exists()
    status, said, steps = checkout.run("--fresh", FAIL="experiments.study")
    assert not kept.exists()
    assert status == 1
    assert "The same command resumes it" in said.splitlines()[-1]
    assert len(steps) == 1, "nothing runs after a failure"


def test_figures_trains_draws_and_copies(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path, "figures.sh")
    made = checkout.root / "output" / "figures"
    made.mkdir(parents=True)
    for name in ("htm_layer1.png", "htm_layer1.svg", "tokenmixup.gif"):
        (made / name).write_text(name)
    status, said, steps = checkout.run()
    assert status == 0, said
    runs = [f"digits_{name}_seed{seed}" for name in ("HVTM", "baseline") for seed in (42, 1, 2)]
    for step, name in zip(steps, runs, strict=False):
        variant, seed = name.removeprefix("digits_").split("_seed")
        config = f"--config configs/digits_{variant}.yaml --seed {seed}"
        assert step == f"-m experiments.train {config} --output output/figures/{name}"
    curves, images = sorted(steps[6:], key=lambda step: "--checkpoint" in step)
    assert "--checkpoint output/figures/digits_HVTM_seed42/final.safetensors" in images
    assert f"--compare {' '.join(f'output/figures/{name}' for name in runs)}" in curves
    copied = sorted(path.name for path in (checkout.root / "docs" / "figures").iterdir())
    assert copied == ["htm_layer1.png", "tokenmixup.gif"]


def test_scripts_are_well_formed() -> None:
    texts = {script: script.read_text() for script in SCRIPTS}
    for script, text in texts.items():
        first = text.splitlines()[0]
        shell = "bash" if first.endswith("bash") else "sh"
        if first.startswith("#!"):
            assert first in ("#!/usr/bin/env bash", "#!/bin/sh")
            assert os.access(script, os.X_OK), f"chmod +x {script}"
        else:
            sourced = rf"^\s*\. .*{re.escape(script.name)}"
            used = any(re.search(sourced, other, re.MULTILINE) for other in texts.values())
            assert used, f"{script} is neither a program nor sourced by one"
        done = subprocess.run([shell, "-n", str(script)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_quickstart_s_models_learn(tmp_path: Path) -> None:
    """The whole script but its set-up: four models that reach 96%, and a picture."""
    (tmp_path / "run").mkdir()
    for name in ("configs", "experiments", "tokenmixup", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "run" / "quickstart.sh", tmp_path / "run")
    (tmp_path / "run" / "setup.sh").touch()
    command = ["bash", str(tmp_path / "run" / "quickstart.sh")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(.+)/1: ([\d.]+)% in", done.stdout, re.MULTILINE)
    assert {name for name, _ in found} == {"plain", "HTM", "VTM", "HTM + VTM"}
    assert all(float(top1) >= 96 for _, top1 in found), found
    picture = tmp_path / "output" / "quickstart" / "pictures" / "tokenmixup.png"
    assert picture.stat().st_size > 10_000
