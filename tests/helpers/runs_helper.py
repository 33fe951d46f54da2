"""A small experiment for the tests of training: digits at 16 x 16 pixels, a CCT of width 32.

T = 16 patch tokens, 2 layers.
"""

from pathlib import Path

import yaml

from experiments.config import RunConfig, load_config

HTM = {"layers": [1], "tau": 0.3, "rho": 0.0005}
VTM = {"layers": [1], "kappa": 3}

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
