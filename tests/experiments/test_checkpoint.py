"""Checkpoints: whole or absent, read without running anything, and strict about every key."""

import os
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.checkpoint import (
    RUN_FORMAT,
    load_checkpoint,
    load_weights,
    read_weights,
    refuse_changed_config,
    save_checkpoint,
    save_final_weights,
)
from experiments.config.schema import as_plain
from experiments.errors import CheckpointError, ConfigError
from experiments.files import atomic_file, write_atomically
from experiments.models.build import build_model
from experiments.zoo.manifest import read_manifest
from tests.helpers.runs_helper import HTM, VTM, small_config


@pytest.fixture
def model(tmp_path):
    return build_model(small_config(tmp_path, horizontal=HTM, vertical=VTM), 10)


def other_model(tmp_path, **sections):
    return build_model(small_config(tmp_path, **{"seed": 99, **sections}), 10)


def same(first, second):
    pairs = zip(first.items(), second.items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def interrupted():
        with atomic_file(path) as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_checkpoint_comes_back(tmp_path, model):
    path = tmp_path / "last.pt"
    content = {"model": model.state_dict(), "config": {"a": [1, None]}}
    save_checkpoint(path, content)
    loaded = load_checkpoint(path)
    assert same(loaded["model"], model.state_dict())
    assert loaded["config"] == {"a": [1, None]}


def test_a_checkpoint_of_an_earlier_version_is_named_and_its_weights_are_read(tmp_path, model):
    path = tmp_path / "last.pt"
    torch.save({"format": RUN_FORMAT, "version": 2, "model": model.state_dict()}, path)
    with pytest.raises(CheckpointError, match="of version 2; this program reads version"):
        load_checkpoint(path)
    assert load_weights(model, path).kind


def test_a_changed_config_is_refused_with_its_keys(tmp_path):
    saved = as_plain(small_config(tmp_path, horizontal=HTM))
    now = as_plain(small_config(tmp_path, "moved", seed=5, data={"workers": 3}))
    with pytest.raises(ConfigError) as caught:
        refuse_changed_config(tmp_path / "last.pt", saved, now)
    message = str(caught.value)
    assert "seed: 42 there, 5 now" in message
    assert "horizontal.tau: 0.3 there, None now" in message
    assert "output" not in message.replace("--output", "")
    assert "workers" not in message
    assert "--allow-changed horizontal.labels,horizontal.layers" in message
    assert refuse_changed_config(tmp_path / "last.pt", saved, saved) == []


def test_named_keys_of_a_config_may_change(tmp_path):
    saved = as_plain(small_config(tmp_path))
    now = as_plain(small_config(tmp_path, seed=5, schedule={"lr": 1.0}))
    told = refuse_changed_config(tmp_path / "a.pt", saved, now, ["seed", "schedule.lr"])
    assert told == ["schedule.lr: 0.002 there, 1.0 now", "seed: 42 there, 5 now"]
    with pytest.raises(ConfigError, match=r"schedule\.lr: 0\.002 there, 1\.0 now; choose"):
        refuse_changed_config(tmp_path / "a.pt", saved, now, ["seed"])
    with pytest.raises(ConfigError, match=r"--allow-changed: data\.rot is as it was"):
        refuse_changed_config(tmp_path / "a.pt", saved, now, ["seed", "schedule.lr", "data.rot"])


def test_final_weights_are_plain_and_repeat_byte_for_byte(tmp_path, model):
    for name in ("a", "b"):
        save_final_weights(tmp_path / name, model)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert load_file(tmp_path / "a").keys() == model.state_dict().keys()


def test_own_files_load_into_a_fresh_model(tmp_path, model):
    save_final_weights(tmp_path / "final.safetensors", model)
    save_checkpoint(tmp_path / "last.pt", {"model": model.state_dict()})
    torch.save(model.state_dict(), tmp_path / "state.bin")
    kinds = []
    for name in ("final.safetensors", "last.pt", "state.bin"):
        fresh = other_model(tmp_path, horizontal=HTM, vertical=VTM)
        assert not same(fresh.state_dict(), model.state_dict())
        loaded = load_weights(fresh, tmp_path / name)
        assert same(fresh.state_dict(), model.state_dict())
        assert loaded.left_out == ()
        kinds.append(loaded.kind)
    assert kinds == ["safetensors", "checkpoint of a run", "state dict"]


def test_a_plain_hosts_weights_leave_the_scorenets_and_say_so(tmp_path, model):
    host = other_model(tmp_path).detach()
    save_file(host.state_dict(), tmp_path / "host.safetensors")
    before = {k: v.clone() for k, v in model.scorenets.state_dict().items()}
    loaded = load_weights(model, tmp_path / "host.safetensors")
    assert same(model.backbone.state_dict(), host.state_dict())
    assert same(model.scorenets.state_dict(), before)
    assert loaded.left_out == tuple(f"scorenets.{name}" for name in before)


def test_a_model_without_scorenets_leaves_those_of_the_file_and_says_so(tmp_path, model):
    save_final_weights(tmp_path / "final.safetensors", model)
    plain = other_model(tmp_path)
    loaded = load_weights(plain, tmp_path / "final.safetensors")
    assert same(plain.backbone.state_dict(), model.backbone.state_dict())
    assert sorted(loaded.unused) == sorted(n for n in model.state_dict() if "scorenets." in n)
    (note,) = loaded.notes
    assert note.startswith("in the file, not used by the model: scorenets.1.")


@pytest.mark.parametrize(
    ("last", "averaged"), [("state_dict", "state_dict_ema"), ("model", "model_ema")]
)
def test_checkpoints_of_timm_and_deit_may_hold_averaged_weights(tmp_path, last, averaged):
    """The last weights are loaded unless the averaged ones are asked for; notes name these."""
    states = {
        key: other_model(tmp_path, seed=n).state_dict() for n, key in ((1, last), (2, averaged))
    }
    path, without = tmp_path / "both.pth", tmp_path / "last.pth"
    torch.save({**states, "epoch": 3, "optimizer": {"state": {}}}, path)
    torch.save({last: states[last]}, without)
    model = other_model(tmp_path)
    loaded = load_weights(model, path)
    assert same(model.state_dict(), states[last])
    (note,) = loaded.notes
    assert f"({averaged}) are not used; experiments.zoo convert FILE --averaged" in note
    loaded = load_weights(model, path, averaged=True)
    assert same(model.state_dict(), states[averaged]) and averaged in loaded.kind
    assert loaded.notes == []
    assert load_weights(model, without).notes == []
    save_final_weights(tmp_path / "final", model)
    for other in (without, tmp_path / "final"):
        with pytest.raises(CheckpointError, match="holds no averaged weights"):
            load_weights(model, other, averaged=True)


def test_a_missing_file_of_the_zoo_is_named_with_the_command_that_fetches_it(tmp_path):
    for name, entry in read_manifest().checkpoints.items():
        with pytest.raises(CheckpointError) as caught:
            read_weights(tmp_path / entry.file)
        command = f"fetch it: python -m experiments.zoo download {name} --weights {tmp_path}"
        assert str(caught.value).endswith(f"No such file or directory; {command}")


def test_keys_and_shapes_that_do_not_fit_are_named(tmp_path, model):
    state = model.state_dict()
    path = tmp_path / "a.bin"
    torch.save(state, path)
    with pytest.raises(
        CheckpointError, match=r"place in the model: scorenets\.1\..*missing.*\.0\."
    ):
        load_weights(other_model(tmp_path, horizontal={**HTM, "layers": [0]}), path)
    torch.save({k: v for k, v in state.items() if k != "backbone.head.bias"}, path)
    with pytest.raises(CheckpointError, match=r"missing in the file: backbone\.head\.bias"):
        load_weights(model, path)
    torch.save({**state, "backbone.head.bias": torch.zeros(7)}, path)
    with pytest.raises(
        CheckpointError, match=r"backbone\.head\.bias is \(7,\) in the file and \(10,\)"
    ):
        load_weights(model, path)
    before = {k: v.clone() for k, v in state.items()}
    assert same(model.state_dict(), before), "a refused file changes nothing"


def cut(content, keep):
    """What writes an object as `torch.save` does, and cuts the file."""

    def write(path):
        torch.save(content, path)
        path.write_bytes(path.read_bytes()[:keep])

    return write


def cut_legacy(path):
    torch.save({"a": torch.ones(1000)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[:300])


def cut_safetensors(path):
    save_file({"a": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:200])


def npz(path, keep=None, **arrays):
    with path.open("wb") as file:
        np.savez(file, **arrays)
    path.write_bytes(path.read_bytes()[:keep])


def plain_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("\n<!DOCTYPE html><title>Quota</title>"), "web page"),
        (lambda path: path.write_bytes(b"\xef\xbb\xbf \n<html>"), "web page"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("these are no weights"), "no checkpoint"),
        (cut({"a": torch.ones(1000)}, 3000), "damaged or cut off"),
        (cut_safetensors, "damaged or cut off"),
        (cut_legacy, "refused or damaged"),
        (lambda path: npz(path, -10, a=np.ones(3)), "cut off"),
        (lambda path: npz(path, a=np.ones(3)), "other arrays than a ViT's"),
        (plain_zip, "without weights"),
        (cut(3, None), "holds a int"),
        (cut({"optimizer": {"lr": 3}}, None), "no state dict"),
        (lambda path: None, "cannot read the checkpoint: No such file"),
        (Path.mkdir, "is a folder, a pipe or a device, not a file"),
    ],
)
def test_files_that_hold_no_weights(tmp_path, model, write, message):
    path = tmp_path / "file.pth.tar"
    write(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_weights(model, path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def unpacked(value):
    """Plain values in place of tensors, to compare checkpoints bit by bit."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {k: unpacked(v) for k, v in value.items()}
    return [unpacked(v) for v in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize("legacy", [False, True], ids=["run", "older format"])
def test_damage_anywhere_is_found_or_changes_nothing(tmp_path, model, legacy):
    """Whatever bit is wrong in a run's checkpoint: one clear error, or the same content.

    Bytes between the parts of the archive, dates and the like hold no content. torch's format
    before the zip has no checksums: there, numbers may change.
    """
    path = tmp_path / "last.pt"
    content = {"model": model.state_dict(), "config": {"seed": 1}}
    if legacy:
        torch.save(content, path, _use_new_zipfile_serialization=False)
    else:
        save_checkpoint(path, content)
    read = read_weights if legacy else load_checkpoint
    whole, expected = path.read_bytes(), None if legacy else unpacked(read(path))
    generator, found = random.Random(0), 0
    places = [round(n * (len(whole) - 1) / 99) for n in range(100)]
    places += [generator.randrange(len(whole)) for _ in range(100)]
    places += list(range(len(whole) - 100, len(whole)))  # the archive's directory
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        try:
            content = read(path)
        except CheckpointError as error:
            found += str(path) in str(error) and "\n" not in str(error)
        else:
            assert legacy or unpacked(content) == expected, place
    assert legacy or found > 0.8 * len(places)
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read(path)
