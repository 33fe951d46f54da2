"""The Python of a page of `docs`, run as a reader runs it, but on a narrow model and few images."""

import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch

from experiments.provenance import ROOT
from tests.helpers.commands import TWO_PROCESSES, finished

PRELUDE = """
import functools, timm, torch
torch.manual_seed(0)
timm.create_model = functools.partial(
    timm.create_model, img_size=16, patch_size=4, embed_dim=32, depth=5, num_heads=2
)
torch.compile = functools.partial(torch.compile, backend="aot_eager")
pairs = [(torch.randn(3, 16, 16), label) for label in range(16)]
loader = train_loader = torch.utils.data.DataLoader(pairs, batch_size=4)
validation_loader = torch.utils.data.DataLoader(pairs, batch_size=5)
"""
"""What the pages leave to the reader, and a small model and a quick compiler for theirs."""


def code_of(page: str) -> dict[str, str]:
    """The code below each heading, with a tau and a rho with which an untrained model mixes."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    found: dict[str, str] = {}
    heading = ""
    pieces = re.findall(r"^## (.+?)$|```python\n(.*?)```", text, flags=re.DOTALL | re.MULTILINE)
    for title, code in pieces:
        heading = title or heading
        if code:
            code = re.sub(r'(tau\W+)0\.2(, "?rho\W+)0\.005', r"\g<1>9.0\g<2>0.0", code)
            found[heading] = found.get(heading, "") + code
    return found


def replaced(code: str, changes: dict[str, str]) -> str:
    """The code with other words, each in the place of some that it has."""
    for theirs, ours in changes.items():
        assert theirs in code, theirs
        code = code.replace(theirs, ours)
    return code


@contextmanager
def imported(folder: Path, name: str, code: str) -> Iterator[ModuleType]:
    """The code as a module, run in this folder, which stays the current one until the end."""
    (folder / f"{name}.py").write_text(code, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setattr(timm, "create_model", timm.create_model)  # the prelude replaces these two
        patch.setattr(torch, "compile", torch.compile)
        yield importlib.import_module(name)


def run_in_two_processes(
    folder: Path, code: str, launcher: tuple[str, ...] = TWO_PROCESSES, **environment: str
) -> str:
    """What the code prints as a program of its own, which must succeed."""
    (folder / "train.py").write_text(code, encoding="utf-8")
    environment = {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), **environment}
    settings = {"cwd": folder, "env": os.environ | environment, "timeout": 600}
    status, out, err = finished(*launcher, "train.py", **settings)
    assert status == 0, err
    return out
