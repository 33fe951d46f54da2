"""What the tests of the zoo share: small checkpoints, entries of a manifest, a quick zoo."""

import hashlib
import io

import torch

from experiments.zoo.download import Zoo
from experiments.zoo.manifest import Checkpoint
from tests.helpers.standins import write_yaml


def entry(url=None, name="small", **fields):
    fields = {"file": f"{name}.pth.tar", "config": "c", "dataset": "d", "method": "HTM", **fields}
    if "drive" not in fields:
        fields["url"] = url or "http://127.0.0.1:9/x"
    return Checkpoint(name=name, **fields)


def saved(seed=0, numbers=500):
    """The bytes of a file that torch.save wrote."""
    file, generator = io.BytesIO(), torch.Generator().manual_seed(seed)
    torch.save({"state_dict": {"w": torch.randn(numbers, generator=generator)}}, file)
    return file.getvalue()


def sha(content):
    return hashlib.sha256(content).hexdigest()


CONTENT = saved()


def quick_zoo(weights, say):
    """A zoo without patience."""
    return Zoo(weights, say=say, timeout=(2, 0.5))


def files_in(folder):
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def manifest_of(tmp_path, **entries):
    checkpoints = {
        name: {
            **{"file": f"{name}.pth.tar", "config": name, "dataset": "d", "method": "HTM"},
            **fields,
        }
        for name, fields in entries.items()
    }
    content = {"tables": {"t": {"title": "T"}}, "datasets": {"d": {"table": "t"}}}
    return write_yaml(tmp_path / "zoo.yaml", {**content, "checkpoints": checkpoints})
