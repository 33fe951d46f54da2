"""A run folder has one writer, whose lock ends with its process."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.errors import ConfigError
from experiments.training.distributed import ONE_PROCESS
from experiments.training.folder import RunFolder
from experiments.training.run import Run
from tests.helpers.runs_helper import small_config

ROOT = Path(__file__).parent.parent.parent.parent
HOLDER = """
import os, pathlib, sys, time
from experiments.training.folder import RunFolder

with RunFolder(pathlib.Path(sys.argv[1])).held():
    if not os.fork():
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_is_refused(tmp_path):
    config = small_config(tmp_path, "run", schedule={"epochs": 1})
    folder = RunFolder(Path(config.output))
    with folder.held(), pytest.raises(ConfigError, match=rf"in use by process {os.getpid()} on"):
        Run(config, ONE_PROCESS).fit()
    Run(config, ONE_PROCESS).fit()


def test_a_forked_process_does_not_keep_the_lock_of_one_that_was_killed(tmp_path):
    """Such as a loader process, which notices the end of the main one only after seconds."""
    folder = RunFolder(tmp_path / "run")
    command = [sys.executable, "-c", HOLDER, str(folder.path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(ConfigError, match=f"process {holder.pid} on"), folder.held():
                pass
            holder.kill()
            holder.wait()
            os.kill(child, 0)  # it lives on
            with folder.held():
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_what_a_crash_left_half_written_is_removed(tmp_path):
    folder = RunFolder(tmp_path / "run")
    left = [folder.path / ".heartbeat.json.x.tmp", folder.checkpoints / ".step-00000011.pt.y.tmp"]
    folder.checkpoints.mkdir(parents=True)
    for path in left:
        path.write_bytes(b"half")
    with folder.held():
        assert not any(path.exists() for path in left)
