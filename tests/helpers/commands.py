"""Commands, in this process and in others: how they end, and what they print."""

import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from experiments import cli
from experiments.provenance import ROOT

TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def outcome(capsys, command, *words) -> tuple[int, str, str]:
    """Exit code and output of a command, such as the module `experiments.train`."""
    capsys.readouterr()  # what was printed before
    try:
        code = cli.run(command.main, [str(word) for word in words])
    except SystemExit as end:
        code = end.code
    return (code, *capsys.readouterr())


def fails(capsys, command, *words, quiet=True) -> str:
    """The line of a person's mistake, with exit code 2; if quiet, all that the command prints."""
    code, out, error = outcome(capsys, command, *words)
    assert code == 2 and not (quiet and out), out + error
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def started(*words, program: str = sys.executable, **settings) -> subprocess.Popen[str]:
    """Start a program, which is Python, with these words on its command line."""
    pipe = subprocess.PIPE
    settings = {"stdout": pipe, "stderr": pipe, "cwd": ROOT, **settings}
    return subprocess.Popen([program, *map(str, words)], text=True, **settings)


def ended(process: subprocess.Popen[str], timeout: float = 240) -> tuple[int, str, str]:
    """Wait for a process; gives its exit code and output."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err


def finished(*words, timeout: float = 240, **settings) -> tuple[int, str, str]:
    """Exit code and output of a program with these words on its command line."""
    return ended(started(*words, **settings), timeout)


def wait_until(there: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait for what a process does; if it does not come, the process is killed."""
    deadline = time.monotonic() + 300
    while not there():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            pytest.fail(f"it did not come: {process.communicate()}")
        time.sleep(0.01)
