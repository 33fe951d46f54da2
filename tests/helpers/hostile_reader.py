"""Read files through the doors that the tests name, in a process of limited memory.

Standard input: a JSON list of [door, path]. Standard output: one JSON object a file.
"""

import importlib
import json
import re
import resource
import sys
import time
import warnings
from pathlib import Path

import torch

from experiments.checkpoint import load_checkpoint, load_weights
from experiments.errors import UserError
from experiments.training.folder import RunFolder
from experiments.zoo.convert import config_of
from experiments.zoo.files import read_whole, recognise_as

importlib.import_module("experiments.models")  # registers CCT

MORE_MEMORY = 3 << 30  # bytes of addresses, so that what fails to be bounded fails soon


def weights(path):
    load_weights(torch.nn.Linear(2, 2), path)


def resume(path):
    folder = RunFolder(path.parent)
    folder.checkpoints = path.parent
    folder.newest_valid(lambda text: None)


def zoo(path):
    """What `zoo verify` does with a file whose hash is not known."""
    recognise_as(path, "npz" if ".npz" in path.name else "torch")
    read_whole(path)


DOORS = {
    "weights": weights,
    "checkpoint": load_checkpoint,
    "resume": resume,
    "zoo": zoo,
    "config": config_of,
}


def memory(name):
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) << 10


def read(door, path):
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, start = memory("VmRSS"), time.perf_counter()
    try:
        DOORS[door](Path(path))
        kind, message = "nothing", ""
    except UserError as error:
        kind, message = type(error).__name__, str(error)
    except BaseException as error:
        kind, message = f"! {type(error).__name__}", str(error)
    return {
        "door": door,
        "path": path,
        "kind": kind,
        "message": message,
        "bytes": memory("VmHWM") - before,
        "seconds": time.perf_counter() - start,
    }


def main():
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    jobs = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + MORE_MEMORY,) * 2)
    for door, path in jobs:
        print(json.dumps({"begun": [door, path]}), flush=True)
        print(json.dumps(read(door, path)), flush=True)


if __name__ == "__main__":
    main()
