"""Google's npz names, against timm's own reader of them."""

import re

import numpy as np
import pytest
import timm
import torch

import tokenmixup
from experiments.checkpoint import load_weights
from experiments.errors import CheckpointError
from tests.helpers.standins import vit_npz


def vit(**kwargs):
    settings = {"embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2, "num_classes": 5}
    return timm.create_model("vit_base_patch16_224", **{"img_size": 64, **settings, **kwargs})


def google_arrays(classes=5, depth=2):
    """Random arrays in the layout of ViT-B_16-224.npz, of a small model."""
    return vit_npz(classes, width=24, layers=depth, heads=3, mlp=48, tokens=17)


def write(folder, arrays):
    path = folder / "vit.npz"
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("image_size", [64, 96])
def test_equals_timms_reader(tmp_path, image_size):
    path = write(tmp_path, google_arrays())
    theirs, ours = vit(img_size=image_size), vit(img_size=image_size)
    theirs.load_pretrained(str(path))
    loaded = load_weights(ours, path)
    assert loaded.kind == "npz of a ViT" and loaded.left_out == ()
    assert loaded.resized is (image_size != 64)
    expected = theirs.state_dict()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_scorenets_stay_as_initialised_and_are_named(tmp_path):
    horizontal = tokenmixup.HorizontalConfig(layers=(1,), tau=0.1, rho=0.01, scorenet="cls")
    model = tokenmixup.attach(vit(), horizontal=horizontal)
    before = model.scorenets["1"].head.weight.clone()
    loaded = load_weights(model, write(tmp_path, google_arrays()))
    assert loaded.left_out == ("scorenets.1.head.weight", "scorenets.1.head.bias")
    assert torch.equal(model.scorenets["1"].head.weight, before)


def test_a_head_of_other_classes_is_left_out_only_when_asked(tmp_path):
    path = write(tmp_path, google_arrays(classes=7))
    model = vit()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"head\.(weight|bias) is \(7"):
        load_weights(model, path)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    loaded = load_weights(model, path, new_head=True)
    assert loaded.left_out == ("head.weight", "head.bias")
    assert torch.equal(model.head.weight, before["head.weight"])
    assert not torch.equal(model.norm.weight, before["norm.weight"])


@pytest.mark.parametrize("kind", ["npz", "state dict"])
def test_a_classifier_with_a_hidden_layer_is_replaced_only_when_asked(tmp_path, kind):
    """Google's ImageNet-21k files have `pre_logits`, as timm's first conversions of them."""
    hidden = {"pre_logits/kernel": np.ones((24, 24)), "pre_logits/bias": np.ones(24)}
    path = write(tmp_path, google_arrays(classes=5) | hidden)
    theirs, ours = vit(), vit()
    theirs.load_pretrained(str(path))  # leaves the hidden layer out, without a word
    names = ("pre_logits.weight", "pre_logits.bias")
    if kind == "state dict":
        names = ("pre_logits.fc.weight", "pre_logits.fc.bias")
        path = tmp_path / "vit.pth"
        torch.save({**theirs.state_dict(), **dict.fromkeys(names, torch.ones(24))}, path)
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"{names[0]}.*set model\.new_head: true"):
        load_weights(ours, path)
    loaded = load_weights(ours, path, new_head=True)
    assert loaded.unused == names and loaded.left_out == ("head.weight", "head.bias")
    assert f"not used by the model: {', '.join(names)}" in loaded.notes[1]
    for name, value in theirs.state_dict().items():
        expected = before[name] if name in loaded.left_out else value
        assert torch.equal(ours.state_dict()[name], expected), name


def without(name):
    return lambda arrays: {key: value for key, value in arrays.items() if name not in key}


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            lambda a: a | {"extra/kernel": np.ones(3)},
            "names that no released ViT has: extra/kernel",
        ),
        (
            without("encoderblock_1/MultiHeadDotProductAttention_1/key/kernel"),
            r"value/kernel without key",
        ),
        (
            without("encoderblock_1/LayerNorm_0/bias"),
            r"missing in the file: blocks\.1\.norm1\.bias",
        ),
        (without("encoderblock_1/"), r"missing in the file: blocks\.1"),
        (without("embedding/kernel"), "npz of other arrays than a ViT's"),
        (lambda a: google_arrays(depth=3), r"without a place .*blocks\.2"),
        (lambda a: a | {"cls": np.array([{}], dtype=object)}, "damaged|cut off|pickle"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, edit, message):
    path = write(tmp_path, edit(google_arrays()))
    with pytest.raises(CheckpointError, match=message) as error:
        load_weights(vit(), path)
    assert re.match(rf"{re.escape(str(path))}: ", str(error.value))
