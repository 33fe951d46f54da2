"""A run folder has one writer, whose lock ends with its process."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from experiments.checkpoint import copied, load_checkpoint, save_checkpoint
from experiments.errors import ConfigError, SavedAndStopped
from experiments.training import folder as folders
from experiments.training.distributed import ONE_PROCESS
from experiments.training.folder import RunFolder
from experiments.training.metrics import Progress
from experiments.training.run import Run
from tests.helpers.commands import started
from tests.helpers.runs_helper import AtLook, fit, small_config

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
    with started("-c", HOLDER, folder.path) as holder:
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


@pytest.fixture
def writing(monkeypatch):
    """A checkpoint is written only when the event is set, which this gives."""
    go, alone = threading.Event(), threading.Lock()

    def save(path, content):
        assert alone.acquire(blocking=False) and go.wait(60)
        save_checkpoint(path, content)
        alone.release()

    monkeypatch.setattr(folders, "save_checkpoint", save)
    return go


def content_of(weight):
    return {"model": {"weight": weight}, "optimizer": {"state": {0: {"step": weight[0]}}}}


def test_a_checkpoint_is_of_the_moment_of_its_save_and_one_is_written_at_a_time(tmp_path, writing):
    folder, weight = RunFolder(tmp_path / "run"), torch.zeros(3)
    threading.Timer(0.3, writing.set).start()
    with folder.held():
        folder.save(1, content_of(weight), keep=2)
        weight += 1  # the next step
        folder.beat("training", Progress())  # nothing went wrong so far
        assert not folder.saved() and not writing.is_set(), "no one waits for the disk"
        folder.save_best({"model": {"weight": weight}})
        assert writing.is_set() and folder.saved(), "the second waits for the first"
        weight += 1
        for step in (2, 3):
            folder.save(step, content_of(weight), keep=2)
            weight += 1
        folder.settle()
        writing.clear()
        folder.save(4, content_of(weight), keep=2)
        threading.Timer(0.3, writing.set).start()
    # the folder is let go of when all is written
    found = {
        path.name: load_checkpoint(path)["model"]["weight"] for path in folder.checkpoints.iterdir()
    }
    values = {name: value.tolist() for name, value in found.items()}
    assert values == {"step-00000003.pt": [3] * 3, "step-00000004.pt": [4] * 3, "best.pt": [1] * 3}


def test_a_copy_is_written_over_where_it_fits():
    content = {"a": torch.arange(3.0), "b": {0: ([torch.ones(2)],), "c": torch.zeros(2, 2)}, "d": 1}
    first = copied(content)
    content["a"] += 1
    content["b"]["c"] = torch.ones(3)
    content["b"][0][0][0] += 1
    assert first["a"].tolist() == [0, 1, 2] and first["b"][0][0][0].tolist() == [1, 1]
    places = first["a"].data_ptr(), first["b"]["c"].data_ptr()
    again = copied(content, first)
    assert again["a"].data_ptr() == places[0] and again["b"]["c"].data_ptr() != places[1]
    assert again["a"].tolist() == [1, 2, 3] and again["b"]["c"].tolist() == [1] * 3
    assert again["d"] == 1 and again["b"].keys() == content["b"].keys()


def failing(path, content):
    raise OSError(28, "No space", str(path))


@pytest.mark.parametrize(
    "then",
    [
        lambda folder: folder.settle(),
        lambda folder: folder.save(2, {}, 2),
        lambda folder: [folder.beat("training", Progress()) for _ in iter(time.monotonic, None)],
    ],
    ids=["settle", "save", "beat"],
)
def test_what_goes_wrong_in_writing_is_told_by_what_comes_next(tmp_path, monkeypatch, then):
    folder = RunFolder(tmp_path / "run")
    monkeypatch.setattr(folders, "save_checkpoint", failing)
    with folder.held():
        folder.save(1, {}, 2)
        with pytest.raises(OSError, match=r"No space.*step-00000001\.pt"):
            then(folder)
        assert folder.last_good() == "there is no checkpoint yet"
        folder.settle()  # it is told once


def test_a_run_that_is_asked_to_stop_waits_for_its_checkpoint(tmp_path, monkeypatch):
    def slow(path, content):
        time.sleep(0.3)
        save_checkpoint(path, content)

    monkeypatch.setattr(folders, "save_checkpoint", slow)
    with pytest.raises(SavedAndStopped, match=r"saved after step 2 .*step-00000002\.pt"):
        fit(tmp_path, requests=AtLook(2), checkpoint={"every_steps": 1})
