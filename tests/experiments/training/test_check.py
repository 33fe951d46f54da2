"""`--check` builds and reads all that a command begins with, and leaves nothing behind."""

import socket

import pytest

from experiments import evaluate, train
from experiments.visualize import __main__ as visualize
from tests.helpers.commands import outcome
from tests.helpers.runs_helper import HTM, VTM, fit, write_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder after one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    return fit(folder, "run", horizontal=HTM, schedule={"epochs": 1})


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a check uses no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def checked(capsys):
    """Check a command; gives its exit code and what it says."""

    def check(command, *words):
        code, _, said = outcome(capsys, command, *words, "--check")
        return code, said

    return check


def content_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_can_run_passes_and_leaves_nothing(tmp_path, trained, checked):
    config = write_config(tmp_path, horizontal=HTM, vertical=VTM)
    words, weights = ("--config", config), trained / "final.safetensors"
    before = [content_of(tmp_path), content_of(trained)]
    assert checked(train, *words, "--output", tmp_path / "run") == (0, "")
    assert checked(train, *words, "--output", tmp_path / "run", "--model.weights", weights)[0] == 0
    for command in (evaluate, visualize):
        assert checked(command, *words, "--checkpoint", weights) == (0, "")
    resumed = ("--config", trained / "config.yaml")
    assert checked(train, *resumed) == (0, "")
    assert [content_of(tmp_path), content_of(trained)] == before
    assert sorted(tmp_path.iterdir()) == [config]


@pytest.mark.parametrize("there", [False, True])
def test_a_data_set_that_is_not_there_yet(there, tmp_path, checked):
    """It is not fetched; what does not need it is checked all the same."""
    root = tmp_path / "data"
    if there:
        root.mkdir()
    data = {"dataset": "torch/cifar10", "root": str(root)}
    config = write_config(tmp_path, data=data, horizontal=HTM)
    words = ("--config", config, "--output", tmp_path / "run")
    code, said = checked(train, *words)
    assert code == 0 and said.startswith("not checked: the data set torch/cifar10;"), said
    assert said.count("\n") == 1 and root.exists() == there and not any(tmp_path.rglob("cifar*"))
    for wrong, message in (
        (("--model.weights", "nothing.npz"), "nothing.npz: cannot read the checkpoint"),
        (("--optimizer.name", "adamx"), "optimizer.name: got 'adamx'"),
        (("--compile", "graphs"), "compile: got 'graphs'"),
        (("--eval_precision", "tf32"), "eval_precision: got 'tf32'"),
        (("--horizontal.layers", "[7]"), "horizontal.layers names layer 7"),
        (("--data.train_split", "trian"), "data set torch/cifar10: split 'trian' is unknown"),
        (("--data.val_split", "train[:90%]"), "split 'train[:90%]' is not understood"),
        (("--data.download", "false"), "data set torch/cifar10, split train: expected in"),
        (("--data.dataset", "torch/nonsense"), "data.dataset: got 'torch/nonsense'"),
        (("--data.dataset", "torch/imagenet"), "data set torch/imagenet, split train: expected in"),
    ):
        code, said = checked(train, *words, *wrong)
        assert code == 2 and message in said, said
    weights = ("--config", config, "--checkpoint", "nothing.pt")
    code, said = checked(evaluate, *weights)
    assert code == 2 and "nothing.pt: cannot read the checkpoint" in said
    code, said = checked(evaluate, *weights, "--eval_precision", "tf32")
    assert code == 2 and "eval_precision: got 'tf32'" in said
    code, said = checked(train, *words, "--data.dataset", "hfds/a")
    assert code == 0 and "the data set hfds/a and the model, whose classes it counts" in said


def test_a_run_that_cannot_resume(tmp_path, trained, checked):
    words = ("--config", trained / "config.yaml")
    code, said = checked(train, *words, "--seed", "7")
    assert code == 2 and "is of another experiment" in said and "seed: 42 there, 7 now" in said
    code, said = checked(
        train, *words, "--schedule.epochs", "2", "--allow-changed", "schedule.epochs"
    )
    assert code == 0 and "resuming with another config: schedule.epochs: 1 there, 2 now" in said
    code, said = checked(train, *words, "--output", tmp_path / "a", "--allow-changed", "seed")
    assert code == 2 and "holds no run to resume" in said


def test_a_damaged_checkpoint_is_named_and_left_in_its_place(tmp_path, checked):
    folder = fit(tmp_path, "run", schedule={"epochs": 2})
    newest = max((folder / "checkpoints").glob("step-*.pt"))
    newest.write_bytes(newest.read_bytes()[:-100])
    before = content_of(folder)
    code, said = checked(train, "--config", folder / "config.yaml")
    assert code == 0 and str(newest) in said and "resuming from the one before" in said
    assert content_of(folder) == before


def test_a_batch_that_the_processes_cannot_share(tmp_path, checked, monkeypatch):
    """run/launch.sh says how many there will be."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    words = ("--config", write_config(tmp_path), "--output", tmp_path / "run")
    code, said = checked(train, *words)
    assert code == 2 and "allowed with 3 processes: a multiple of 3" in said
    assert checked(train, *words, "--data.batch_size", "129")[0] == 0
    monkeypatch.setenv("WORLD_SIZE", "2")  # a share of 15
    words = (*words, "--data.batch_size", "30")
    assert checked(train, *words)[0] == 0
    code, said = checked(train, *words, "--mixup.mixup_alpha", "0.8")
    assert code == 2 and "data.batch_size: got 30;" in said and "a multiple of 4" in said
