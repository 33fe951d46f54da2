"""Untrusted files: nothing in them runs, and each gives one clear error."""

import itertools
import tarfile

import pytest
import torch

from experiments import evaluate, train
from experiments.checkpoint import load_checkpoint, load_weights, save_checkpoint
from experiments.data.shards import ShardImages
from experiments.errors import CheckpointError, DataError
from experiments.zoo import __main__ as zoo
from experiments.zoo.convert import config_of
from tests.helpers.commands import fails, finished
from tests.helpers.hostile_files import GIB, HOSTILE, PLACES, gadgets
from tests.helpers.runs_helper import write_config
from tests.helpers.zoo_helper import entry, quick_zoo


def weights(path):
    load_weights(torch.nn.Linear(2, 2), path)


def verify(path):
    """What `zoo verify` does with a file whose hash is not known."""
    quick_zoo(path.parent, print).verify(entry(file=path.name))


DOORS = {"weights": weights, "checkpoint": load_checkpoint, "zoo": verify, "config": config_of}


def refusal(door, path):
    """The one line with which a file is refused."""
    with pytest.raises(CheckpointError) as caught:
        DOORS[door](path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    assert len(message) < 3 * len(str(path)) + 700
    return message


def placed(folder, name):
    target = folder / name.replace(" ", "-")
    target.mkdir()
    return target / "step-00000001.pt"


@pytest.mark.parametrize("case", HOSTILE)
def test_harmful_files_are_refused_in_one_line(case, tmp_path):
    path = placed(tmp_path, case)
    HOSTILE[case](path)
    for door in ("weights", "checkpoint"):
        refusal(door, path)
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize(("door", "place"), [*itertools.product(DOORS, PLACES)])
def test_nothing_in_a_file_runs(door, place, tmp_path):
    trap = tmp_path / "trap"
    for name, gadget in gadgets(trap).items():
        path = placed(tmp_path, f"{place} {name}")
        PLACES[place](gadget, path)
        if (door, place) == ("config", "npz"):
            assert config_of(path) is None
        elif place == "npz":
            assert "Object arrays cannot be loaded" in refusal(door, path) or door == "checkpoint"
        else:
            assert "is refused" in refusal(door, path)
        assert not trap.exists()


def test_the_gadgets_would_run(tmp_path):
    """The traps are set: a reader that trusts its file falls into them."""
    trap, path = tmp_path / "trap", tmp_path / "a.pt"
    code = "import sys, torch; torch.load(sys.argv[1], weights_only=" + "False)"
    PLACES["tensor"](gadgets(trap)["os.system"], path)
    finished("-c", code, path)
    assert trap.exists()


@pytest.mark.parametrize("case", ["tar", "stride of zero", "npz of objects", "pipe"])
def test_entry_points_tell_a_harmful_file_in_one_line(case, tmp_path, capsys):
    path, config = tmp_path / "weights.pt", write_config(tmp_path)
    HOSTILE[case](path)
    assert str(path) in fails(capsys, evaluate, "--config", config, "--checkpoint", path)
    words = ("--config", config, "--output", tmp_path / "run", "--model.weights", path)
    assert str(path) in fails(capsys, train, *words)
    words = ("convert", path, "--config", config, "--output", tmp_path / "out.safetensors")
    assert str(path) in fails(capsys, zoo, *words)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"config": 3},
        {"config": {}, "data": 3},
        {"config": {"a": [[]] * 9}, "model": 1},
    ],
    ids=str,
)
def test_a_checkpoint_that_holds_no_run(content, tmp_path, capsys):
    config, run = write_config(tmp_path), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    path = run / "checkpoints" / "step-00000001.pt"
    save_checkpoint(path, content)
    assert str(path) in fails(capsys, train, "--config", config, "--output", run)


def shard(path, *members):
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, kind, size in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, "/etc/passwd", size
            archive.addfile(member)


FILE, LINK, PIPE = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../../escaped.jpg", FILE, 0)], "has no class"),
        ([("/tmp/escaped.cls", FILE, 0)], "allowed: a class number"),
        ([("a.jpg", FILE, 8 * GIB)], "is cut off within"),
        ([("a.cls", FILE, 8 * GIB)], "is cut off within"),
    ],
)
def test_shards_that_would_harm(members, message, tmp_path):
    """Nothing of a shard is ever extracted: its names are no paths."""
    shard(tmp_path / "a.tar", *members)
    with pytest.raises(DataError, match=message) as caught:
        ShardImages(tmp_path, "a.tar")
    assert "a.tar" in str(caught.value) and "\n" not in str(caught.value)


def test_links_and_pipes_in_a_shard_are_passed_over(tmp_path):
    shard(tmp_path / "a.tar", ("a.jpg", LINK, 0), ("a.cls", PIPE, 0), ("b.cls", LINK, 0))
    assert len(ShardImages(tmp_path, "a.tar")) == 0
