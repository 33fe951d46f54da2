"""A small experiment for the tests of training: digits at 16 x 16 pixels, a CCT of width 32.

T = 16 patch tokens, 2 layers.
"""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from experiments.config.reading import load_config
from experiments.config.schema import RunConfig
from experiments.training.distributed import ONE_PROCESS
from experiments.training.folder import RunFolder
from experiments.training.metrics import CLOCK_VALUES, read_metrics
from experiments.training.run import Run
from experiments.training.stopping import StopRequests
from tests.helpers.commands import wait_until

HTM = {"layers": [1], "tau": 0.3, "rho": 0.0005}
VTM = {"layers": [1], "kappa": 3}
DROPOUT = {"attn_drop_rate": 0.1, "drop_path_rate": 0.1}
BOTH = {"horizontal": HTM, "vertical": VTM, "model": DROPOUT}

SMALL = {
    "device": "cpu",
    "model": {"name": "cct_2_3x2_32", "image_size": 16, "kwargs": {"embed_dim": 32}},
    "data": {
        "dataset": "digits",
        "batch_size": 128,
        "workers": 0,
        "scale": [0.7, 1.0],
        "hflip": 0.0,
        "color_jitter": 0.0,
    },
    "schedule": {"epochs": 2, "lr": 2.0e-3, "interval": "step"},
    "logging": {"interval": 4, "tensorboard": False},
}


def write_config(folder: Path, name: str = "small", **sections) -> Path:
    """Write SMALL with further sections (or whole values) to a file of the folder."""
    content = {
        key: dict(value) if isinstance(value, dict) else value for key, value in SMALL.items()
    }
    for key, value in sections.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            content[key].update(value)
        else:
            content[key] = value
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def small_config(folder: Path, name: str = "small", **sections) -> RunConfig:
    """The same, read, with its run folder inside the folder."""
    output = str(folder / "output" / name)
    return load_config(write_config(folder, name, output=output, **sections))


def fit(folder: Path, name: str = "run", requests=None, allow_changed=(), **sections) -> Path:
    """Train on the digits in this process; gives the run folder."""
    config = small_config(folder, name, **sections)
    Run(config, ONE_PROCESS).fit(requests, allow_changed)
    return Path(config.output)


def rows_without_clock(folder: Path) -> list[dict]:
    """The rows of metrics without the values that differ when a run is repeated."""
    return [{k: v for k, v in row.items() if k not in CLOCK_VALUES} for row in read_metrics(folder)]


def final_bytes(folder: Path) -> bytes:
    """The final weights of a run."""
    return (folder / "final.safetensors").read_bytes()


def assert_rows_agree(folder: Path, other: Path, rel: float, abs: float) -> None:
    """The rows of metrics of two runs agree up to rounding."""
    for row, another in zip(rows_without_clock(folder), rows_without_clock(other), strict=True):
        assert another.pop("split") == row.pop("split")
        assert another == pytest.approx(row, rel=rel, abs=abs)


def wait_for_step(folder: Path, process: subprocess.Popen[str], step: int) -> None:
    """Wait until the run has saved this step."""
    name = f"step-{step:08d}"
    wait_until(lambda: any(path.stem >= name for path in RunFolder(folder).saved()), process)


class AtLook(StopRequests):
    """Asks a run to stop, or calls an action instead, when it looks for the n-th time.

    A run looks after every step and in every batch of the evaluation.
    """

    def __init__(self, look: int, action: Callable[[], object] | None = None) -> None:
        super().__init__()
        self.looks, self.action = look, action

    @property
    def reason(self) -> str | None:
        self.looks -= 1
        if self.action is None:
            return "the test" if self.looks <= 0 else None
        if self.looks == 0:
            self.action()
        return None
