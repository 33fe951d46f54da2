"""`reproduce` from end to end on stand-ins: what is evaluated, skipped, kept and taken up again."""

import json
from pathlib import Path

import pytest
import torch

from experiments import cli, evaluate
from experiments.checkpoint import LOCK_FILE, load_plain
from experiments.data.loading import EvalBatches
from experiments.errors import DataError
from experiments.reproduce import __main__ as reproduce
from experiments.training.evaluation import Assessment
from experiments.zoo.manifest import read_manifest
from tests.helpers.commands import fails
from tests.helpers.http_server import Server, ranges, status
from tests.helpers.reproduce_world import IMAGES, accept_cifar, copy_world, make_world
from tests.helpers.standins import save_vit, vit_state


@pytest.fixture(scope="module")
def first_world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


NOTHING = DataError.exit_code
"""No row could be evaluated."""


@pytest.fixture
def world(first_world, tmp_path, monkeypatch):
    for name in ("DATA", "WEIGHTS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    accept_cifar(first_world, monkeypatch)
    return copy_world(first_world, tmp_path)


@pytest.fixture
def run(world, capsys):
    def call(*words, code=0):
        given = cli.run(reproduce.main, world.words(*words))
        captured = capsys.readouterr()
        assert given == code, captured.err
        if "nothing could be evaluated" in captured.err:
            return captured.out  # why, row by row
        return captured.out if code == 0 else captured.err

    return call


def rows_of(world, table="cifar"):
    content = json.loads((world.results / f"{table}.json").read_text())
    return {row["name"]: row for row in content["rows"]}


@pytest.fixture
def evaluations(monkeypatch):
    """The names of the checkpoints that are evaluated, in order; "stop" at the end interrupts."""
    seen = []

    class Seen(Assessment):
        def __init__(self, config, checkpoint, world):
            if seen[-1:] == ["stop"]:
                raise KeyboardInterrupt
            super().__init__(config, checkpoint, world)
            seen.append(Path(checkpoint).name)

    monkeypatch.setattr("experiments.reproduce.evaluate.Assessment", Seen)
    return seen


def test_both_tables_from_end_to_end(world, run, capsys):
    # what these weights really reach, by the other entry point
    config = read_manifest(world.manifest).config_path("cifar10_VTM")
    checkpoint = world.weights / "cct_cifar10_vtm.pth.tar"
    content = load_plain(checkpoint)
    torch.save({**content, "state_dict_ema": content["state_dict"]}, checkpoint)
    words = ["--config", str(config), "--checkpoint", str(checkpoint), "--json"]
    assert cli.run(evaluate.main, words) == 0
    expected = json.loads(capsys.readouterr().out)
    # a figure that counts as reproduced, and one that is just too far away
    world.change("cct_cifar10_vtm", published_top1=round(expected["top1"] + 0.1, 2))
    world.change("cct_cifar10_htm", published_top1=99.0)
    out = run()
    assert f"{checkpoint}: the averaged weights in the file (state_dict_ema) are not used" in out

    rows = rows_of(world)
    vtm = rows["cct_cifar10_vtm"]
    assert vtm["status"] == "reproduced"
    measured = {"ours": "top1", "top5": "top5", "loss": "loss"}
    assert all(vtm[a] == pytest.approx(expected[b], abs=1e-4) for a, b in measured.items())
    assert vtm["difference"] == pytest.approx(-0.1)
    assert vtm["images"] == vtm["expected_images"] == IMAGES
    assert vtm["hardware"] and vtm["device"] == "cpu" and vtm["precision"] == "fp32"
    assert {"python", "torch", "timm", "tokenmixup"} <= vtm["versions"].keys()
    assert vtm["command"].startswith("python -m experiments.reproduce --manifest ")
    assert vtm["time"].endswith("+00:00") and vtm["seconds"] > 0
    assert vtm["commit"] is None or len(vtm["commit"]) >= 12
    assert rows["cct_cifar10_htm"]["status"] == "differs"
    assert rows["cct_cifar10_htm"]["difference"] < -0.1

    baseline, missing = rows["cifar10_baseline"], rows["cct_cifar10_hvtm"]
    assert baseline["status"] == missing["status"] == "skipped"
    assert (
        "train it: python -m experiments.reproduce --train cifar10_baseline" in baseline["reason"]
    )
    assert "cct_cifar10_hvtm.pth.tar is not there; fetch it: python -m" in missing["reason"]
    assert "https://drive.google.com/file/d/id-of-cct_cifar10_hvtm/view" in missing["reason"]
    assert missing["ours"] is None

    vits = rows_of(world, "imagenet")
    assert vits["VIT_HTM"]["status"] == "part of the images"
    assert vits["VIT_HTM"]["images"] == 10 and vits["VIT_HTM"]["expected_images"] == 50000

    # the hashes were recorded, the pages are there, and all of it is told
    assert (world.weights / LOCK_FILE).exists()
    names = {path.name for path in world.results.iterdir() if not path.name.startswith(".")}
    assert names == {"evaluations.jsonl"} | {
        f"{t}.{e}" for t in ("cifar", "imagenet") for e in ("json", "md", "html")
    }
    markdown = " ".join((world.results / "cifar.md").read_text().split())
    assert f"| {vtm['published']:.2f} | {vtm['ours']:.2f} |" in markdown
    assert "CIFAR-10, baseline: of its authors; no checkpoint was released" in markdown
    assert "reproduced" in out and "skipped: " in out and "\x1b" not in out
    assert str(world.results / "cifar.json") in out


def test_rows_are_kept_while_nothing_changed(world, run, evaluations):
    run("--table", "imagenet")
    assert evaluations == ["VIT_HTM.bin", "VIT_VTM.bin", "ViT.npz"]
    before = rows_of(world, "imagenet")
    assert "(--fresh: again)" in run("--table", "imagenet")
    assert len(evaluations) == 3 and rows_of(world, "imagenet") == before
    run("--table", "imagenet", "--fresh")
    assert len(evaluations) == 6
    run("VIT_VTM", "--data.crop_pct", "1.0")
    assert evaluations[6:] == ["VIT_VTM.bin"]
    # another file: refused by its hash, until that is what somebody wants
    before = rows_of(world, "imagenet")
    small = {"width": 48, "layers": 4, "mlp": 96, "tokens": 17}
    save_vit(world.weights / "VIT_VTM.bin", vit_state(5, seed=9, **small))
    out = run("VIT_VTM")
    assert "is not the file that it should be" in out and "is kept" in out
    assert rows_of(world, "imagenet") == before
    (world.weights / LOCK_FILE).unlink()
    run("VIT_VTM")
    assert evaluations[7:] == ["VIT_VTM.bin"]


def test_each_row_ends_its_loader(run, monkeypatch):
    closed = []
    close = EvalBatches.close
    monkeypatch.setattr(EvalBatches, "close", lambda self: closed.append(close(self)))
    run("VIT_HTM", "VIT_VTM")
    assert len(closed) == 2


def test_an_interruption_is_taken_up_again(world, run, evaluations):
    run("cct_cifar10_htm")
    first = rows_of(world)["cct_cifar10_htm"]
    evaluations.append("stop")
    assert "interrupted" in run("--table", "cifar", code=130)
    rows = rows_of(world)  # the finished row is there, and the rest is told as not done
    assert rows["cct_cifar10_htm"] == first
    assert rows["cct_cifar10_vtm"]["status"] == "not evaluated"
    assert "not evaluated" in (world.results / "cifar.html").read_text()
    evaluations.pop()
    run("--table", "cifar")
    names = ("cifar10_htm", "cifar10_vtm", "cifar100_htm")
    assert evaluations == [f"cct_{name}.pth.tar" for name in names]
    assert rows_of(world)["cct_cifar10_htm"] == first


def test_a_result_outlives_its_file(world, run):
    run("VIT_HTM")
    before = rows_of(world, "imagenet")
    (world.weights / "VIT_HTM.bin").unlink()
    out = run("VIT_HTM")
    assert "is not there" in out and "is kept" in out
    assert rows_of(world, "imagenet") == before


def unusable(world):
    (world.weights / "VIT_HTM.bin").write_text("<html><title>Sign in</title>")
    return "VIT_HTM", "is a web page"


def of_another_model(world):
    save_vit(world.weights / "VIT_HTM.bin", vit_state(5, width=32, layers=4, mlp=96, tokens=17))
    return "VIT_HTM", "(here "


def without_config(world):
    world.change("VIT_HTM", config="nothing")
    return "VIT_HTM", "nothing.yaml: cannot read the config"


def without_data(world):
    return "VIT_HTM --data.root nowhere", "expected in"


@pytest.mark.parametrize("spoil", [unusable, of_another_model, without_config, without_data])
def test_what_cannot_be_evaluated_is_skipped_with_a_reason(world, run, spoil):
    words, message = spoil(world)
    out = run(*words.split(), code=NOTHING)
    assert message in out, out
    row = rows_of(world, "imagenet")["VIT_HTM"]
    assert row["status"] == "skipped" and message in row["reason"]
    assert message in (world.results / "imagenet.md").read_text()


def test_missing_data_is_not_fetched_unasked(world, run, tmp_path):
    out = run("cct_cifar10_htm", "--data.root", str(tmp_path / "nothing"), code=NOTHING)
    assert "data set torch/cifar10, split validation: expected in" in out
    assert not (tmp_path / "nothing").exists()


def test_missing_weights_are_fetched_when_asked(world, run):
    path = world.weights / "VIT_HTM.bin"
    with Server() as server:
        for name in ("VIT_HTM", "VIT_VTM"):
            url = server.offer(f"/{name}", ranges(path.read_bytes()))
            world.change(name, url=url, drive=None)
        server.offer("/VIT_VTM", status(404))
        path.unlink()
        (world.weights / "VIT_VTM.bin").unlink()
        out = run("--table", "imagenet", "--download")
    assert f"VIT_HTM: from {server.address}" in out
    rows = rows_of(world, "imagenet")
    assert rows["VIT_HTM"]["images"] == 10
    assert "404 Not Found" in rows["VIT_VTM"]["reason"]
    assert f"put it at {world.weights}/VIT_VTM.bin" in rows["VIT_VTM"]["reason"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--table digits", "--table: got 'digits'; allowed: cifar, imagenet, all"),
        ("nothing", "'nothing': no such row"),
        ("VIT_HTM --table cifar", "'VIT_HTM': is a row of imagenet, not of cifar"),
        ("--tables cifar", "--tables: unknown option; the nearest is table"),
        ("--data.roots x", "--data.roots: unknown option; the nearest is data.root"),
        ("--output x", "--output: unknown option"),
        ("--train", "--train: name the rows, or give --table"),
        ("--train VIT_HTM --fresh", "--fresh: has no meaning with --train"),
        ("--train VIT_HTM --seeds 1,a", "--seeds: got '1,a'; allowed: whole numbers"),
        ("--train VIT_HTM --seeds 1,1", "--seeds: got '1,1'"),
        ("--seeds 1", "--seeds: has a meaning only with --train"),
        ("--jobs 2", "--jobs: has a meaning only with --train"),
        ("--train VIT_HTM --jobs 0", "--jobs: got '0'"),
        ("--train --run vit_HTM/x", "--seeds: got 'x'"),
        ("--train --run vit_HTM/1 --jobs 2", "--jobs: has no meaning with --run"),
        ("--train VIT_HTM --run vit_HTM/1", "'VIT_HTM': has no meaning with --run"),
        ("--render --table cifar", "--table: has no meaning with --render"),
        ("VIT_HTM --device tpu", "device: got 'tpu'; allowed"),
        ("VIT_HTM --data.batch_size many", "data.batch_size: got 'many'"),
    ],
)
def test_a_wrong_command_line_is_told_in_one_line(world, capsys, words, message):
    places = ["--manifest", str(world.manifest), "--results", str(world.results)]
    if "--train" not in words and "--render" not in words:
        places += ["--weights", str(world.weights)]
    error = fails(capsys, reproduce, *words.split(), *places)
    assert message in error and error.startswith("error: command line")
    assert not world.results.exists()


def test_help(capsys):
    assert cli.run(reproduce.main, ["--help"]) == 0
    assert capsys.readouterr().out == reproduce.USAGE


def test_data_folder_from_the_environment(world, run, monkeypatch):
    monkeypatch.setenv("DATA", "nowhere-at-all")
    monkeypatch.setenv("WEIGHTS", "not-used")
    assert "nowhere-at-all" in run("VIT_HTM", code=NOTHING)
