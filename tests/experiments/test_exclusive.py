"""Locks: they end with the process that holds them, whoever it has forked."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.files import Occupied, exclusive, held

ROOT = Path(__file__).parent.parent.parent
HOLDER = """
import os, pathlib, sys, time
from experiments.files import held

with held(pathlib.Path(sys.argv[1])):
    if not os.fork():
        print(os.getpid(), flush=True)  # by now it has let go of the lock
    time.sleep(60)
"""


def test_a_forked_process_does_not_keep_the_lock_of_one_that_was_killed(tmp_path):
    """As the data loader's processes, which notice its end only after seconds."""
    lock = tmp_path / ".lock"
    command = [sys.executable, "-c", HOLDER, str(lock)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(Occupied, match=f"process {holder.pid} on "), held(lock):
                pass
            holder.kill()
            holder.wait()
            os.kill(child, 0)  # it lives on
            with held(lock):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_lock_is_held_once_and_free_afterwards(tmp_path):
    lock = tmp_path / ".lock"
    with held(lock), pytest.raises(Occupied), held(lock):
        pass
    with held(lock):
        pass


def test_a_crash_releases_the_lock_of_a_path_and_leaves_no_file(tmp_path):
    path = tmp_path / "file"
    if not (child := os.fork()):
        with exclusive(path):
            os._exit(9)
    os.waitpid(child, 0)
    assert (tmp_path / ".file.lock").exists()
    with exclusive(path, lambda: pytest.fail("nobody holds it")):
        pass
    assert list(tmp_path.iterdir()) == []
