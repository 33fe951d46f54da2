"""Converted checkpoints: every tensor, the config and the provenance, and the same evaluation."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from experiments import cli, evaluate
from experiments.checkpoint import (
    LOCK_FILE,
    file_hash,
    load_weights,
    save_checkpoint,
    save_final_weights,
)
from experiments.config.schema import as_plain
from experiments.errors import CheckpointError, UserError
from experiments.models.build import build_model
from experiments.zoo import __main__ as zoo
from experiments.zoo import convert
from experiments.zoo.manifest import read_manifest
from tests.helpers.reproduce_world import accept_cifar, copy_world, make_world
from tests.helpers.runs_helper import HTM, small_config
from tests.helpers.standins import cct_state, save_cct


@pytest.fixture(scope="module")
def first_world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(first_world, tmp_path, monkeypatch):
    accept_cifar(first_world, monkeypatch)
    return copy_world(first_world, tmp_path)


@pytest.fixture
def run(world, capsys):
    def call(*words, code=0):
        places = ("--manifest", world.manifest, "--weights", world.weights)
        assert cli.run(zoo.main, [str(w) for w in ("convert", *words, *places)]) == code
        captured = capsys.readouterr()
        return captured.out + captured.err

    return call


def evaluated(capsys, config, checkpoint):
    words = ["--config", str(config), "--checkpoint", str(checkpoint), "--json"]
    assert cli.run(evaluate.main, words) == 0
    facts = json.loads(capsys.readouterr().out)
    return {key: facts[key] for key in ("top1", "top5", "loss", "images")}


@pytest.mark.parametrize(
    "name", ["cct_cifar10_htm", "cct_cifar10_vtm", "VIT_HTM", "VIT_VTM", "ViT"]
)
def test_the_result_evaluates_identically(world, run, capsys, name):
    entry = read_manifest(world.manifest).checkpoint(name)
    config = read_manifest(world.manifest).config_path(entry.config)
    assert "with their config and provenance" in run(name)
    converted = world.weights / f"{name}.safetensors"
    before = evaluated(capsys, config, world.weights / entry.file)
    assert evaluated(capsys, config, converted) == before
    assert (
        file_hash(world.weights / entry.file)
        == json.loads(convert.read_metadata(converted)["provenance"])["sha256"]
    )


def test_it_holds_every_tensor_config_and_provenance(world, run):
    run("cct_cifar10_htm")
    converted = world.weights / "cct_cifar10_htm.safetensors"
    released = cct_state(10, htm=2, seed=1)
    assert sum(v.numel() for v in load_file(converted).values()) == sum(
        v.numel() for v in released.values()
    )
    with safe_open(converted, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "pt"
    told = json.loads(metadata["provenance"])
    assert told["zoo"] == "cct_cifar10_htm" and told["published_top1"] == 97.5
    assert told["link"] == "https://drive.google.com/file/d/id-of-cct_cifar10_htm/view"
    assert told["file"] == "cct_cifar10_htm.pth.tar" and told["kind"] == "released checkpoint"
    assert told["converted_by"].startswith("tokenmixup ") and told["left_as_initialised"] == []
    plain = json.loads(metadata["config"])
    assert plain["horizontal"]["layers"] == [2] and plain["model"]["name"] == "cct_7_3x1_32"
    assert str(world.folder) not in metadata["config"] and "root" not in plain["data"]


def test_the_config_inside_is_enough(world, run):
    """From a converted file alone its model can be built, and it can be converted again."""
    run("cct_cifar10_htm")
    converted = world.weights / "cct_cifar10_htm.safetensors"
    config = convert.config_of(converted)
    assert config is not None and config.horizontal is not None
    model = build_model(config, 10)
    assert load_weights(model, converted).left_out == ()
    again = world.folder / "again.safetensors"
    run(converted, "--output", again)
    assert all(torch.equal(v, load_file(converted)[k]) for k, v in load_file(again).items())


def test_the_same_file_gives_the_same_bytes(world, run):
    outputs = [world.folder / f"{number}.safetensors" for number in range(4)]
    for output in outputs:
        run("VIT_HTM", "--output", output)
    assert len({output.read_bytes() for output in outputs}) == 1


def test_a_checkpoint_of_a_run_carries_its_config(world, run, tmp_path):
    config = small_config(tmp_path, horizontal=HTM)
    model = build_model(config, 10)
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": model.state_dict(), "config": as_plain(config)})
    run(path)
    converted = tmp_path / "last.safetensors"
    state = load_file(converted)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    inside = convert.config_of(converted)
    assert inside is not None and inside.model == config.model
    assert inside.horizontal == config.horizontal


def test_other_files_need_a_config(world, run, tmp_path):
    config = small_config(tmp_path)
    model = build_model(config, 10)
    weights = tmp_path / "final.safetensors"
    save_final_weights(weights, model)
    assert "carries no config" in run(weights, "--output", tmp_path / "x", code=2)
    output = tmp_path / "out.safetensors"
    run(weights, "--config", tmp_path / "small.yaml", "--output", output)
    assert load_file(output).keys() == load_file(weights).keys()


def test_averaged_weights_become_a_file_of_their_own(world, run, tmp_path):
    states = [cct_state(10, seed=seed) for seed in (1, 2)]
    path = tmp_path / "both.pth.tar"
    torch.save(dict(zip(("state_dict", "state_dict_ema"), states, strict=True)), path)
    config = read_manifest(world.manifest).config_path("cifar10_VTM")
    said = run(path, "--config", config)
    assert "the averaged weights in the file (state_dict_ema) are not used" in said
    run(path, "--config", config, "--averaged")
    for name, state in zip(("both", "both.averaged"), states, strict=True):
        found = load_file(tmp_path / f"{name}.safetensors")["backbone.pos_embed"]
        assert torch.equal(found, state["classifier.positional_emb"])
        told = json.loads(convert.read_metadata(tmp_path / f"{name}.safetensors")["provenance"])
        assert told["averaged"] == ("averaged" in name) and told["not_used"] == []


def test_a_file_that_does_not_fit_is_not_converted(world, run, tmp_path):
    path = tmp_path / "other.pth.tar"
    save_cct(path, cct_state(10, width=128))
    config = read_manifest(world.manifest).config_path("cifar10_HTM")
    assert "does not fit the model" in run(path, "--config", config, code=2)
    assert list(tmp_path.glob("*.safetensors")) == []


def test_a_file_that_was_replaced_is_not_converted(world, run):
    run("VIT_HTM")
    path = world.weights / "VIT_HTM.bin"
    path.write_bytes((world.weights / "VIT_VTM.bin").read_bytes())
    assert (world.weights / LOCK_FILE).exists()
    assert "is not the file that it should be" in run("VIT_HTM", code=2)
    assert "is not the file that it should be" in run(path, code=2)
    converted = world.weights / "VIT_HTM.safetensors"
    assert "is the file to be converted" in run(converted, code=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "the config in its metadata is no JSON"),
        ('{"nothing": 1}', "'nothing'"),
        ('{"data": 1}', "data: got 1; allowed: a section"),
    ],
)
def test_a_config_inside_that_cannot_be_used_is_told(tmp_path, config, message):
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.ones(10)}, path, metadata={"config": config})
    with pytest.raises(UserError, match=message):
        convert.config_of(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match="metadata"):
        convert.config_of(path)
