"""Google's npz names, against timm's own reader of them."""

import re

import numpy as np
import pytest
import timm
import torch

import tokenmixup
from experiments.checkpoint import load_weights
from experiments.errors import CheckpointError


def vit(**kwargs):
    settings = {"embed_dim": 24, "depth": 2, "num_heads": 3, "mlp_ratio": 2, "num_classes": 5}
    return timm.create_model("vit_base_patch16_224", **{"img_size": 64, **settings, **kwargs})


def google_arrays(classes=5, grid=4, depth=2, seed=0):
    """Random arrays in the layout of ViT-B_16-224.npz, of a small model."""
    rng = np.random.default_rng(seed)
    width, heads, head, hidden = 24, 3, 8, 48

    def array(*shape):
        return rng.normal(size=shape).astype(np.float32)

    arrays = {
        "cls": array(1, 1, width),
        "embedding/kernel": array(16, 16, 3, width),
        "embedding/bias": array(width),
        "Transformer/posembed_input/pos_embedding": array(1, grid * grid + 1, width),
        "Transformer/encoder_norm/scale": array(width),
        "Transformer/encoder_norm/bias": array(width),
        "head/kernel": array(width, classes),
        "head/bias": array(classes),
    }
    for layer in range(depth):
        block = f"Transformer/encoderblock_{layer}/"
        attention = block + "MultiHeadDotProductAttention_1/"
        for norm in ("LayerNorm_0", "LayerNorm_2"):
            arrays |= {f"{block}{norm}/scale": array(width), f"{block}{norm}/bias": array(width)}
        for part in ("query", "key", "value"):
            arrays[f"{attention}{part}/kernel"] = array(width, heads, head)
            arrays[f"{attention}{part}/bias"] = array(heads, head)
        arrays[f"{attention}out/kernel"] = array(heads, head, width)
        arrays[f"{attention}out/bias"] = array(width)
        for index, (before, after) in enumerate(((width, hidden), (hidden, width))):
            arrays[f"{block}MlpBlock_3/Dense_{index}/kernel"] = array(before, after)
            arrays[f"{block}MlpBlock_3/Dense_{index}/bias"] = array(after)
    return arrays


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
