"""The launcher, with real processes on one machine and on two, both on loopback."""

import os
import socket

import pytest
from safetensors.torch import load_file

from tests.helpers.commands import ended, finished, started

# Two steps show that all processes have met.
SHORT = ("--schedule.epochs", "1", "--data.batch_size", "700", "--logging.tensorboard", "false")


def start(folder, *words, **environment):
    command = ("run/train.sh", "digits_baseline", *SHORT, *words, "--output", folder)
    return started(*command, program="sh", env=os.environ | {"MAX_RESTARTS": "0", **environment})


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(*processes):
    outcomes = [ended(process) for process in processes]
    for code, _, errors in outcomes:
        assert code == 0, errors
    return "".join(text for _, text, _ in outcomes)


@pytest.mark.parametrize(
    ("words", "processes", "message"),
    [
        (("--schedule.epoch", "3"), "2", "command line: --schedule.epoch: unknown option"),
        (("--model.name", "vit_tny"), "2", "model.name: got 'vit_tny'"),
        ((), "3", "data.batch_size: got 700; allowed with 3 processes: a multiple of 3"),
    ],
)
def test_a_mistake_is_reported_once_and_not_retried(tmp_path, words, processes, message):
    code, _, errors = ended(start(tmp_path / "run", *words, NPROC=processes, MAX_RESTARTS="3"))
    assert code == 2, errors
    (line,) = errors.splitlines()
    assert line.startswith("error: ") and message in line


def words_of(tmp_path, script, *words, **environment):
    """The arguments that a script gives to Python."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    python.chmod(0o755)
    environment = os.environ | {"TOKENMIXUP_PYTHON": str(python), **environment}
    code, out, errors = finished(f"run/{script}", *words, program="sh", env=environment)
    assert code == 0, errors
    return out.splitlines()


@pytest.mark.parametrize("script", ["train_vit_imagenet_HTM.sh", "eval_vit_imagenet_HTM.sh"])
def test_the_command_line_goes_before_the_environment(tmp_path, script):
    """Each option reaches Python once; twice on the command line stays twice, an error there."""
    there = {"DATA": "/the data", "WEIGHTS": "/weights"}
    options = {"--data.root": "/the data"}
    if script.startswith("train"):
        options["--model.weights"] = "/weights/ViT-B_16-224.npz"
    words = words_of(tmp_path, script, **there)
    for option, value in options.items():
        assert words.count(option) == 1 and words[words.index(option) + 1] == value
        for given in ([option, "/my own"], [f"{option}=/my own"]):
            found = words_of(tmp_path, script, *given, **there)
            assert found[-len(given) :] == given
            assert [w for w in found if w.startswith(option)] == given[:1]
            assert value not in found
        assert words_of(tmp_path, script, option, "a", option, "b", **there).count(option) == 2
    assert not set(options) & set(words_of(tmp_path, script, DATA="", WEIGHTS=""))


def test_a_missing_checkpoint_is_named_with_the_command_that_fetches_it(tmp_path):
    words = ("run/eval_cct_7-3x1_cifar10_HTM.sh", "--device", "cpu")
    environment = os.environ | {"WEIGHTS": str(tmp_path)}
    code, _, errors = finished(*words, program="sh", env=environment)
    assert code == 2, errors
    command = f"python -m experiments.zoo download cct_cifar10_htm --weights {tmp_path}"
    assert errors.endswith(f"No such file or directory; fetch it: {command}\n")


@pytest.mark.slow
def test_two_processes_on_one_machine(tmp_path):
    text = finish(start(tmp_path / "run", NPROC="2"))
    assert "2 × cpu" in text
    assert load_file(tmp_path / "run" / "final.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["address", "rendezvous"])
def test_two_machines(tmp_path, way):
    port = str(free_port())
    if way == "address":
        common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    else:
        common = {"RDZV_ENDPOINT": f"127.0.0.1:{port}"}
    nodes = [start(tmp_path / "run", NNODES="2", NODE_RANK=str(rank), **common) for rank in (0, 1)]
    text = finish(*nodes)
    assert text.count("2 × cpu") == 1, "one of the two processes reports"
    assert load_file(tmp_path / "run" / "final.safetensors")
