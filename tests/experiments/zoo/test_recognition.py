"""`zoo verify`: a file is recognised by its content, whatever its name, and read to its end."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch

from experiments.checkpoint import LOCK_FILE, read_weights
from experiments.errors import CheckpointError
from tests.helpers.standins import cct_state, save_cct, vit_npz, vit_state
from tests.helpers.zoo_helper import CONTENT, entry, files_in, quick_zoo, saved, sha


@pytest.fixture
def weights(tmp_path):
    return tmp_path / "weights"


@pytest.fixture
def small_zoo(weights):
    return quick_zoo(weights, lambda text: None)


def npz(compressed=False, **arrays):
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def legacy():
    file = io.BytesIO()
    torch.save({"w": torch.randn(500)}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def tensors():
    from safetensors.torch import save

    return save({"w": torch.ones(100)})


def flipped(content):
    """One byte of a tensor's data changed."""
    place = content.index(
        torch.load(io.BytesIO(content), weights_only=True)["state_dict"]["w"].numpy().tobytes()
    )
    return content[: place + 8] + bytes([content[place + 8] ^ 1]) + content[place + 9 :]


def archive(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return file.getvalue()


VIT = vit_npz(5)

USABLE = {
    "zip of torch": (CONTENT, "torch"),
    "legacy pickle": (legacy(), "torch"),
    "npz": (npz(**VIT), "npz"),
    "compressed npz": (npz(True, **VIT), "npz"),
    "safetensors": (tensors(), "safetensors"),
}


@pytest.mark.parametrize("case", USABLE)
def test_usable_files_are_recognised(small_zoo, weights, case):
    content, kind = USABLE[case]
    weights.mkdir()
    (weights / "small.pth.tar").write_bytes(content)
    assert small_zoo.verify(entry(kind=kind)) == sha(content)
    other = "npz" if kind != "npz" else "torch"
    (weights / LOCK_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"is of the kind {kind}, expected {other}"):
        small_zoo.verify(entry(kind=other))


UNUSABLE = {
    "page": (b"<!DOCTYPE html>", "torch", "web page"),
    "nothing": (b"", "torch", "is empty"),
    "text": (b"404: Not Found", "torch", "no checkpoint"),
    "cut zip": (CONTENT[:-200], "torch", "cut off"),
    "cut legacy pickle": (legacy()[:-500], "torch", "cut off"),
    "cut npz": (npz(**VIT)[:-10], "npz", "cut off"),
    "cut safetensors": (tensors()[:-10], "safetensors", "cut off"),
    "flipped bit": (flipped(CONTENT), "torch", "does not match its checksum"),
    "npz of other arrays": (npz(a=np.ones(3)), "npz", "other arrays than a ViT's"),
    "npz with objects": (npz(a=np.array([{}, None], dtype=object)), "npz", "Object arrays"),
    "zip of other things": (archive(readme="hello"), "torch", "without weights"),
    "no state dict": (pickle.dumps({"lr": 3}), "torch", "no state dict|refused|damaged"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_files_are_told_apart(small_zoo, weights, case):
    content, kind, message = UNUSABLE[case]
    weights.mkdir()
    path = weights / "small.pth.tar"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        small_zoo.verify(entry(kind=kind))
    assert path.read_bytes() == content  # what a person put there is theirs
    assert files_in(weights) == ["small.pth.tar"]


def test_the_hash_is_checked_wherever_weights_are_read(small_zoo, weights):
    weights.mkdir()
    path = weights / "small.pth.tar"
    path.write_bytes(CONTENT)
    small_zoo.verify(entry())
    assert read_weights(path).kind == "checkpoint of timm"
    path.write_bytes(saved(1))
    with pytest.raises(CheckpointError, match="is not the file that it should be"):
        read_weights(path)


def test_stand_ins_have_the_released_layout(tmp_path):
    """What the other tests take for released checkpoints has the size that is published."""
    state = cct_state(10, htm=2)
    assert sum(value.numel() for value in state.values()) == 3_762_966
    assert len(vit_state(10, htm=1, width=48, layers=2, mlp=96)) == 4 + 2 * 16 + 2 + 2 + 2
    assert len(read_weights(save_cct(tmp_path / "cct.pth.tar", state)).state_dict) == len(state)
