"""`python -m tokenmixup`: what a report of a problem should hold."""

import subprocess
import sys

import torch

import tokenmixup
from tokenmixup import __main__ as command


def test_it_names_versions_what_was_built_and_hosts(monkeypatch):
    lines = dict(line.split("  ", 1) for line in command.report().splitlines())
    told = {name: value.strip() for name, value in lines.items()}
    assert told["tokenmixup"] == tokenmixup.__version__ and told["torch"] in torch.__version__
    assert told["solver in C"] == "built"
    assert told["torchvision"].endswith("(hosts: VisionTransformer, SwinTransformer)")
    monkeypatch.setattr(command._assignment, "compiled_solver", lambda: None)
    monkeypatch.setattr(command, "_LIBRARIES", ("timm", "no_such_library"))
    assert "solver in C      not built; lapx finds" in command.report()
    assert "no_such_library  not installed" in command.report()


def test_both_commands_print_it_without_any_library_of_hosts():
    code = (
        "import runpy, sys; runpy.run_module('tokenmixup', run_name='__main__'); "
        "assert not {'timm', 'torchvision', 'transformers', 'peft'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == command.report() + "\n"
