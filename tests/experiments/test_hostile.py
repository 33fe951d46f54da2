"""Files made to harm: through every door one clear error, nothing run, no memory filled."""

import itertools
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from experiments import cli, evaluate, train
from experiments.checkpoint import load_checkpoint, read_weights, save_sealed
from experiments.data.shards import ShardImages
from experiments.errors import CheckpointError, DataError
from experiments.zoo import __main__ as zoo
from tests.helpers.hostile_files import GIB, HOSTILE, PLACES, gadgets, seal, with_gadget
from tests.helpers.runs_helper import write_config
from tests.helpers.zoo_helper import entry, quick_zoo

ROOT = Path(__file__).parent.parent.parent
READER = Path(__file__).parent / "hostile_reader.py"
DOORS = ("weights", "checkpoint", "resume", "zoo", "config")
MEMORY, SECONDS = 64 << 20, 5.0


def read_all(jobs):
    """Let another process read the files, and give what it found of each."""
    done = subprocess.run(
        [sys.executable, str(READER)],
        input=json.dumps([[door, str(path)] for door, path in jobs]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"ended within {lines[-1:]}: {done.stderr[-2000:]}"
    found = [line for line in lines if "begun" not in line]
    assert len(found) == len(jobs)
    return found


def refused(found):
    """Whether one file came to one clear error, at little cost."""
    return (
        found["kind"] == "CheckpointError"
        and found["path"] in found["message"]
        and "\n" not in found["message"]
        and len(found["message"]) < len(found["path"]) * 3 + 700
        and found["bytes"] < MEMORY
        and found["seconds"] < SECONDS
    )


def placed(folder, name, door):
    """Where a file lies, so that a door takes it."""
    target = folder / f"{door}-{name.replace(' ', '-').replace('..', 'dots')}"
    target.mkdir()
    ending = ".npz" if "npz" in name else ""
    return target / f"step-00000001{ending}.pt" if door != "resume" else target / "step-00000001.pt"


def test_hostile_files_are_refused_through_every_door(tmp_path):
    jobs = []
    for (name, write), door in itertools.product(HOSTILE.items(), DOORS):
        path = placed(tmp_path, name, door)
        write(path)
        if door in ("checkpoint", "resume") and path.is_file():
            seal(path)
        jobs.append((door, path))
    # to look for a config in a file need not read its weights
    harmless = {("config", "npz"), ("config", "safetensors"), ("config", "nested-lists")}
    wrong = [
        found
        for found in read_all(jobs)
        if not refused(found)
        and not any(found["door"] == d and n in found["path"] for d, n in harmless)
    ]
    assert not wrong, "\n".join(map(str, wrong))
    assert not list(tmp_path.rglob("*escaped*"))
    assert not Path("/tmp/escaped").exists()


def test_gadgets_do_not_run_wherever_they_stand(tmp_path):
    trap = tmp_path / "trap"
    jobs = []
    for door, (name, gadget), place in itertools.product(DOORS, gadgets(trap).items(), PLACES):
        path = placed(tmp_path, f"{name} {place}", door)
        with_gadget(place)(path, trap, gadget)
        if door in ("checkpoint", "resume") and place != "sealed":
            seal(path)
        jobs.append((door, path))
    wrong = [
        found
        for found in read_all(jobs)
        if not refused(found) and not (found["door"] == "config" and "npz" in found["path"])
    ]
    assert not trap.exists()
    assert not wrong, "\n".join(map(str, wrong))


def test_the_gadgets_would_run(tmp_path):
    """The traps are set: a reader that trusts its file falls into them."""
    trap, path = tmp_path / "trap", tmp_path / "a.pt"
    code = "import sys, torch; torch.load(sys.argv[1], weights_only=" + "False)"
    with_gadget("tensor")(path, trap, gadgets(trap)["os.system"])
    subprocess.run([sys.executable, "-c", code, path], check=False, capture_output=True)
    assert trap.exists()


def fails(capsys, module, *words):
    """The one line of an entry point that must fail."""
    code = cli.run(module.main, [str(word) for word in words])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


SOME = ("keys nested a million times", "stride of zero", "npz bomb", "pipe")


@pytest.mark.parametrize("case", SOME)
def test_entry_points_tell_a_hostile_file_in_one_line(case, tmp_path, capsys):
    path, config = tmp_path / "weights.pt", write_config(tmp_path)
    HOSTILE[case](path)
    assert str(path) in fails(capsys, evaluate, "--config", config, "--checkpoint", path)
    words = ("--config", config, "--output", tmp_path / "run", "--model.weights", path)
    assert str(path) in fails(capsys, train, *words)
    words = ("convert", path, "--config", config, "--output", tmp_path / "out.safetensors")
    assert str(path) in fails(capsys, zoo, *words)
    assert not (tmp_path / "out.safetensors").exists()
    weights = tmp_path / "weights"
    weights.mkdir()
    HOSTILE[case](weights / "small.pth.tar")
    with pytest.raises(CheckpointError, match=r"small\.pth\.tar"):
        quick_zoo(weights, print).verify(entry(kind="npz" if "npz" in case else "torch"))


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
def test_a_sealed_checkpoint_that_holds_no_run(content, tmp_path, capsys):
    config, run = write_config(tmp_path), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    path = run / "checkpoints" / "step-00000001.pt"
    save_sealed(path, {"format": "tokenmixup.run", "version": 2, **content})
    assert str(path) in fails(capsys, train, "--config", config, "--output", run)


def test_what_checkpoints_hold_is_still_read(tmp_path):
    """The limits are far from what a model needs: names by the thousand, and tied weights."""
    path = tmp_path / "large.pt"
    tied = torch.ones(100, 100)
    state = {f"blocks.{n}.weight": torch.full((3,), float(n)) for n in range(5000)}
    torch.save({**state, "head": tied, "embedding": tied, "view": tied.t()}, path)
    found = read_weights(path).state_dict
    assert len(found) == 5003
    assert found["blocks.4999.weight"].tolist() == [4999.0] * 3
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2)) for _ in range(1000)])
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones(2)
    optimizer.step()
    save_sealed(path, {"format": "tokenmixup.run", "version": 2, "o": optimizer.state_dict()})
    assert len(load_checkpoint(path)["o"]["state"]) == 1000


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
